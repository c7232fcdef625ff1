"""Whole lists of prompts: `translate`, `beam_search` and `score`, each with an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from decode.engine.attribution import Explanation
from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.sequence import Completion, Hypothesis, SamplingParams, Sequence, Stats
from minillama import InputError

Prompt = SequenceOf[int]
# One list for all members, or one per member by name.
Prompts = SequenceOf[Prompt] | Mapping[str, SequenceOf[Prompt]]

GREEDY = SamplingParams()


@dataclass
class Translations:
    """In the order of the prompts: new tokens (prompt and stop token not included), their log-probabilities in nats,
    why each ended ("stop" or "length"), and explanations where requested (see `Completion`).
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[str]
    stats: Stats
    explanations: list[SequenceOf[Explanation]] = field(default_factory=list)


def translate(
    ensemble: Ensemble,
    prompts: Prompts,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    ignore_eos: bool = False,
    on_finished: Callable[[int, Completion], None] | None = None,
    speculate: str | int = "off",
    params: SamplingParams = GREEDY,
    explain: bool = False,
) -> Translations:
    """Decode all prompts; `on_finished(index, completion)` is called as each one ends.

    prompts: token ids, a list per sentence, or {"L": [...], "S": [...]} with a list per member. With ignore_eos stop
    tokens are ordinary ones and every result has max_new_tokens, as far as the context reaches. speculate: "off",
    "auto" or the number of tokens to draft; the tokens are the same. params: greedy unless it says otherwise. explain:
    return why each token was sampled (attribution.py).
    Raises InputError for prompts that do not fit a member's context, FloatingPointError when a member's logits are NaN
    or infinite.
    """
    stops = frozenset[int]() if ignore_eos else None
    sequences = [
        Sequence(prompt, params, max_new_tokens, stops, explain=explain) for prompt in _per_member(ensemble, prompts)
    ]
    for index, sequence in enumerate(sequences):
        sequence.key = index
    engine = Engine.fitting(ensemble, sequences, batch_size, speculate)
    results: list[Completion | None] = [None] * len(sequences)
    for index, completion in engine.generate(sequences):
        results[index] = completion
        if on_finished is not None:
            on_finished(index, completion)
    done = [result for result in results if result is not None]
    return Translations(
        [result.tokens for result in done],
        [result.logprobs for result in done],
        [result.finish_reason for result in done],
        engine.stats,
        [result.explanations for result in done],
    )


def beam_search(
    ensemble: Ensemble,
    prompts: Prompts,
    beams: int = 4,
    max_new_tokens: int = 256,
    length_penalty: float = 1.0,
    batch_size: int = 16,
    nbest: int | None = None,
    ignore_eos: bool = False,
) -> list[list[Hypothesis]]:
    """For each prompt its `nbest` (default: all `beams`) best hypotheses, best first, by the combined distribution.

    prompts: as `translate` takes them.   beams: 1 to 8.   length_penalty: see beam.py; 0 sums.   batch_size: KV slots,
    of which a sentence has `beams`; one sentence at least is searched at a time. With ignore_eos every hypothesis has
    max_new_tokens, as far as the context reaches. Fewer hypotheses come back only where masks leave fewer. Raises
    InputError for prompts that do not fit a member's context and for numbers out of range, FloatingPointError when a
    member's logits are NaN or infinite.
    """
    if nbest is not None and nbest < 1:
        raise InputError(f"nbest {nbest}: {beams} beams give 1 to {beams} hypotheses")
    params = SamplingParams(beams=beams, length_penalty=length_penalty, nbest=beams if nbest is None else nbest)
    results: list[list[Hypothesis]] = []

    def add(index: int, completion: Completion) -> None:
        results[index] = list(completion.hypotheses)

    sequences = _per_member(ensemble, prompts)
    results = [[] for _ in sequences]
    translate(ensemble, prompts, max_new_tokens, batch_size, ignore_eos, add, params=params)
    return results


def score(
    ensemble: Ensemble,
    prompts: SequenceOf[tuple[list[int], ...]],
    targets: SequenceOf[list[int]],
    batch_size: int = 16,
    keep_hidden: bool = False,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) for each prompt (a list per member) and text (token ids, without a stop token).

    The completion has the text's log-probabilities, or with keep_hidden the members' hidden states instead. Raises
    InputError for a prompt that is empty and for one that with its text does not fit a member's context,
    FloatingPointError for NaN or infinite logits.
    """
    pairs = zip(prompts, targets, strict=True)
    sequences = [Sequence(prompt, targets=target, keep_hidden=keep_hidden) for prompt, target in pairs]
    if sequences:
        yield from Engine.fitting(ensemble, sequences, batch_size).generate(sequences)


def _per_member(ensemble: Ensemble, prompts: Prompts) -> list[tuple[list[int], ...]]:
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
