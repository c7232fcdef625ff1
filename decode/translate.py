"""Continuous batching: which prompt goes into which row, and when.

The longest prompts start first. A row that ends is refilled at once: its prompt is read in parts, in the same passes in
which other rows decode. What all prompts begin with is read once. Results come out as they end, and a row's result does
not depend on its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from decode.draws import Draws
from decode.engine.ensemble import Ensemble
from decode.engine.attribution import Explanation
from decode.engine.kv_slots import Rows
from decode.engine.speculative import Speculation
from decode.step import InFlight, step
from minillama import InputError

Prompt = Sequence[int]
# One list for all members, or one per member by name.
Prompts = Sequence[Prompt] | Mapping[str, Sequence[Prompt]]


@dataclass(frozen=True)
class Hypothesis:
    """An entry of an n-best list: see decode/beam.py.

    logprobs: in nats, of the tokens and, where `finished` is "stop", behind them of the stop token, which is not in
    `tokens`.   score: their sum, divided by their number to the power of the length penalty.   explanations: where they
    were asked for, one for each of `logprobs`.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: str
    score: float
    explanations: list[Explanation] = field(default_factory=list)


@dataclass(frozen=True)
class Translation:
    """`finished` says why it ended: "stop" (a stop token, not included) or "length".

    nbest: what beam search found, best first; the translation is the first of them.
    explanations: where they were asked for, one for each token and, behind a "stop", one for the stop token.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: str
    nbest: Sequence[Hypothesis] = ()
    explanations: Sequence[Explanation] = ()


@dataclass
class Counters:
    """What decoding did: steps of the whole ensemble, tokens kept, tokens drafted and those of them that were kept.

    drafters: the latter two of each member that drafted, and of `lookup`.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    kept: int = 0
    drafters: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_draft(self, drafter: str, drafted: int, kept: int) -> None:
        before = self.drafters.get(drafter, (0, 0))
        self.drafters[drafter] = before[0] + drafted, before[1] + kept
        self.drafted += drafted
        self.kept += kept


@dataclass
class Translations:
    """In the order of the prompts: new tokens (prompt and stop token not included), their log-probabilities in nats.

    explanations: see `Translation`.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[str]
    counters: Counters
    explanations: list[Sequence[Explanation]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.counters.steps


def translate(
    ensemble: Ensemble,
    prompts: Prompts,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    ignore_eos: bool = False,
    on_finished: Callable[[int, Translation], None] | None = None,
    speculate: str | int = "off",
    draws: Draws | None = None,
    explaining: bool = False,
    counters: Counters | None = None,
) -> Translations:
    """Decode all prompts; `on_finished(index, translation)` is called as each one ends.

    prompts: token ids, a list per sentence, or {"L": [...], "S": [...]} with a list per member. With ignore_eos stop
    tokens are ordinary ones and every result has max_new_tokens, as far as the context reaches. speculate: "off",
    "auto" or the number of tokens to draft; the tokens are the same. draws: sample instead of taking the best token.
    explaining: say of every token why it was chosen (decode/explain.py). counters: those to count in, for a caller who
    watches them meanwhile.
    Raises InputError for prompts that do not fit a member's context, FloatingPointError when a member's logits are NaN
    or infinite.
    """
    rows = per_member(ensemble, prompts)
    counters = Counters() if counters is None else counters
    results: list[Translation | None] = [None] * len(rows)
    stops = frozenset() if ignore_eos else ensemble.stop_tokens
    limits = max_new_tokens, batch_size
    for index, translation in decode(ensemble, rows, *limits, stops, counters, speculate, draws, explaining):
        results[index] = translation
        if on_finished is not None:
            on_finished(index, translation)
    done = [result for result in results if result is not None]
    return Translations(
        [result.tokens for result in done],
        [result.logprobs for result in done],
        [result.finished for result in done],
        counters,
        [result.explanations for result in done],
    )


def per_member(ensemble: Ensemble, prompts: Prompts) -> list[tuple[list[int], ...]]:
    """For each sentence a tuple of prompts in the members' order; raises InputError if lists are missing or unequal."""
    if not isinstance(prompts, Mapping):
        return [(list(prompt),) * len(ensemble.members) for prompt in prompts]
    missing = [name for name in ensemble.names if name not in prompts]
    if missing:
        raise InputError(f"no prompts for {', '.join(missing)}; every member needs a list")
    counts = {name: len(prompts[name]) for name in ensemble.names}
    if len(set(counts.values())) > 1:
        raise InputError(f"the members have unequal numbers of prompts: {counts}")
    return [tuple(list(prompt) for prompt in row) for row in zip(*(prompts[name] for name in ensemble.names))]


def room(ensemble: Ensemble, prompt: Sequence[Prompt]) -> int:
    """New tokens that every member's context has room for behind its prompt; zero or less: the prompt does not fit."""
    return min(context - len(part) for context, part in zip(ensemble.context.values(), prompt))


def decode(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    max_new_tokens: int,
    batch_size: int,
    stops: frozenset[int],
    counters: Counters,
    speculate: str | int = "off",
    draws: Draws | None = None,
    explaining: bool = False,
) -> Iterator[tuple[int, Translation]]:
    """Yield (index, translation) as sentences end, longest prompts started first."""
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1")
    limits = limits_of(ensemble, prompts, max_new_tokens)
    weights = [member.model.nbytes for member in ensemble.members]
    speculation = Speculation(len(ensemble.members), speculate, weights)
    if not prompts:
        return
    members = range(len(ensemble.members))
    capacity = [max(len(prompt[n]) + limit for prompt, limit in zip(prompts, limits)) for n in members]
    prefix = [shared_prefix([prompt[n] for prompt in prompts]) for n in members]
    rows = Rows(ensemble, min(batch_size, len(prompts)), capacity, prefix)
    waiting = sorted(range(len(prompts)), key=lambda index: sum(map(len, prompts[index])))  # the last is the longest
    active: list[InFlight] = []
    while waiting or active:
        while waiting and len(active) < rows.batch_size:
            index = waiting.pop()
            rows.start()
            unread = [prompt[len(read) :] for prompt, read in zip(prompts[index], prefix)]
            active.append(InFlight(index, limits[index], prompts[index], unread))
        gained = step(ensemble, rows, active, speculation, draws, counters, explaining)
        ended = []
        for number, (row, tokens) in enumerate(zip(active, gained)):
            for token, logprob in tokens:
                if token in stops:
                    ended.append((number, "stop"))
                    break
                row.tokens.append(token)
                row.logprobs.append(logprob)
                counters.tokens += 1
                if len(row.tokens) == row.limit:
                    ended.append((number, "length"))
                    break
        finished = [(active[number], reason) for number, reason in ended]
        for source, target in rows.remove([number for number, _ in ended]):
            active[target] = active[source]
        del active[len(rows) :]
        for row, reason in finished:
            explanations = row.explanations[: len(row.tokens) + (reason == "stop")]
            yield row.index, Translation(row.tokens, row.logprobs, reason, explanations=explanations)


def limits_of(ensemble: Ensemble, prompts: Sequence[tuple[list[int], ...]], max_new_tokens: int) -> list[int]:
    """New tokens each prompt may get; raises InputError for one that is empty or has no room behind it."""
    limits = [min(max_new_tokens, room(ensemble, prompt)) for prompt in prompts]
    for index, (prompt, limit) in enumerate(zip(prompts, limits)):
        if not all(prompt):
            raise InputError(f"prompt {index + 1} is empty; a model needs at least one token to go on from")
        if limit < 1:
            raise InputError(
                f"prompt {index + 1} has {max(map(len, prompt))} tokens; a member's context has no room behind it"
            )
    return limits


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that several prompts all begin with; every prompt keeps one of its own behind them."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), shortest)
    return first[: min(length, shortest)]
