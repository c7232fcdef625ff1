"""Beam search over an ensemble: the K likeliest translations, many sentences at a time.

    score = (sum of the log-probabilities of the tokens and of the stop token behind them) / their number ** penalty

as fairseq (`--lenpen`), Marian (`--normalize`) and transformers (`length_penalty`) have it: generated tokens are
counted, the stop token among them, the prompt not. A hypothesis that has no stop token because it ran into the limit
is divided by the number of tokens it has.

The search is that of transformers' `generate(num_beams=K, early_stopping=False)`, so that n-best lists are the same:
each step the candidates of all K beams are sorted by their sums; those among the K first that end are finished, and the
K best that do not end go on. It is over when K are finished and the best running sum, divided by its present length,
is no better than the worst of them (or at the limit). That rule is a heuristic: with a positive penalty a running
hypothesis could still win later.

Exactness needs few candidates: of each beam's own the K best that do not end and those that end among its K best, so
K + (number of stop tokens).

A sentence has K rows of its own. Its prompt is read once, in the first of them. Where a beam goes on in two ways, one
stays in its row and the other takes the row of a beam that died, of which only the positions behind their last common
token are copied. A finished sentence's rows are refilled at once, and its result does not depend on its neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decode.engine.ensemble import Ensemble
from decode.engine.attribution import Explanation, explain
from decode.engine.kv_slots import Rows
from decode.step import prompt_parts
from decode.translate import Counters, Hypothesis, Prompts, limits_of, per_member, shared_prefix
from kernels.types import MAX_TOP_K
from minillama import InputError

MOST_BEAMS = 8


@dataclass(frozen=True)
class Beam:
    """A running hypothesis: its tokens, their log-probabilities in nats, and the sum of those.

    row: from which row of its sentence the last token came.   explanations: of the tokens; the last one's is added
    behind the step that took it.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    row: int = 0
    explanations: list[Explanation] = field(default_factory=list)

    def then(self, token: int, logprob: float, row: int) -> "Beam":
        logprobs = [*self.logprobs, logprob]
        return Beam([*self.tokens, token], logprobs, self.total + logprob, row, list(self.explanations))


@dataclass(frozen=True)
class Rules:
    """What decides a search beside the models."""

    beams: int
    length_penalty: float
    stops: frozenset[int]
    explaining: bool = False

    def score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty


@dataclass
class Sentence:
    """A sentence in flight: the beam in each of its rows (None: no beam), and what is finished, best first.

    taken: what the last step's tokens led to, running or finished.
    """

    index: int
    limit: int
    prompt: tuple[list[int], ...]
    unread: list[list[int]]
    beams: list[Beam | None]
    finished: list[Hypothesis] = field(default_factory=list)
    taken: list[Beam] = field(default_factory=list)

    def extend(self, candidates: Sequence[Sequence[tuple[int, float]]], rules: Rules) -> list[int | None]:
        """Go on with the best candidates, given for each row; says which row each row goes on from (None: no beam).

        A beam's first continuation stays in its row. When the search is over all are None.
        """
        running = [(row, beam) for row, beam in enumerate(self.beams) if beam is not None]
        length = len(running[0][1].tokens) + 1
        found = sorted(
            (-(beam.total + logprob), row, token, logprob)
            for row, beam in running
            for token, logprob in candidates[row]
        )
        going: list[tuple[int, Beam]] = []
        self.taken = []
        for rank, (_, row, token, logprob) in enumerate(found):
            beam = self.beams[row]
            assert beam is not None
            if token not in rules.stops and length < self.limit:
                going.append((row, beam.then(token, logprob, row)))
            elif rank < rules.beams:
                self.taken.append(beam.then(token, logprob, row))
                self._finish(self.taken[-1], rules)
        del going[rules.beams :]
        self.beams = [None] * rules.beams
        sources: list[int | None] = [None] * rules.beams
        if self._over([beam for _, beam in going], rules):
            return sources
        self.taken += [beam for _, beam in going]
        further = []
        for row, beam in going:
            if sources[row] is None:
                sources[row], self.beams[row] = row, beam
            else:
                further.append((row, beam))
        free = [row for row, source in enumerate(sources) if source is None]
        for target, (row, beam) in zip(free, further):
            sources[target], self.beams[target] = row, beam
        return sources

    def _finish(self, whole: Beam, rules: Rules) -> None:
        score = rules.score(whole.total, len(whole.tokens))
        stopped = whole.tokens[-1] in rules.stops
        tokens = whole.tokens[:-1] if stopped else whole.tokens
        reason = "stop" if stopped else "length"
        self.finished.append(Hypothesis(tokens, whole.logprobs, reason, score, whole.explanations))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier one first on ties
        del self.finished[rules.beams :]

    def _over(self, going: Sequence[Beam], rules: Rules) -> bool:
        if not going:
            return True
        if len(self.finished) < rules.beams:
            return False
        best = rules.score(max(beam.total for beam in going), len(going[0].tokens))
        return best <= self.finished[-1].score


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

    prompts: as `translate` takes them.   beams: 1 to 8.   length_penalty: see the head of this file; 0 sums.
    batch_size: rows, of which a sentence has `beams`; one sentence at least is searched at a time. With ignore_eos
    every hypothesis has max_new_tokens, as far as the context reaches. Fewer hypotheses come back only where masks
    leave fewer. Raises InputError for prompts that do not fit a member's context and for numbers out of range,
    FloatingPointError when a member's logits are NaN or infinite.
    """
    rows = per_member(ensemble, prompts)
    if nbest is not None and not 1 <= nbest <= beams:
        raise InputError(f"nbest {nbest}: {beams} beams give 1 to {beams} hypotheses")
    rules = Rules(beams, length_penalty, frozenset() if ignore_eos else ensemble.stop_tokens)
    results: list[list[Hypothesis]] = [[] for _ in rows]
    for index, hypotheses in search(ensemble, rows, max_new_tokens, batch_size, rules, Counters()):
        results[index] = hypotheses[:nbest]
    return results


def search(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    max_new_tokens: int,
    batch_size: int,
    rules: Rules,
    counters: Counters,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Yield (index, n-best list) as sentences end, longest prompts started first."""
    beams = rules.beams
    if not 1 <= beams <= MOST_BEAMS:
        raise InputError(f"{beams} beams: 1 to {MOST_BEAMS} can be searched")
    if beams + len(rules.stops) > MAX_TOP_K:
        raise InputError(
            f"{beams} beams with {len(rules.stops)} stop tokens need {beams + len(rules.stops)} candidates a row, "
            f"{MAX_TOP_K} can be had; use {max(MAX_TOP_K - len(rules.stops), 1)} beams or fewer"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1")
    limits = limits_of(ensemble, prompts, max_new_tokens)
    if not prompts:
        return
    members = range(len(ensemble.members))
    capacity = [max(len(prompt[n]) + limit for prompt, limit in zip(prompts, limits)) for n in members]
    prefix = [shared_prefix([prompt[n] for prompt in prompts]) for n in members]
    rows = Rows(ensemble, min(max(batch_size // beams, 1), len(prompts)) * beams, capacity, prefix)
    waiting = sorted(range(len(prompts)), key=lambda index: sum(map(len, prompts[index])))  # the last is the longest

    def begin() -> Sentence:
        index = waiting.pop()
        unread = [prompt[len(read) :] for prompt, read in zip(prompts[index], prefix)]
        return Sentence(index, limits[index], prompts[index], unread, [Beam(), *[None] * (beams - 1)])

    active: list[Sentence] = []
    while len(rows) < rows.batch_size:
        for _ in range(beams):
            rows.start()
        active.append(begin())
    while active:
        _step(ensemble, rows, active, rules)
        counters.steps += 1
        ended = [slot for slot, sentence in enumerate(active) if not any(sentence.beams)]
        finished = [active[slot] for slot in ended]
        empty = []
        for slot in ended:
            if not waiting:
                empty.append(slot)
                continue
            active[slot] = begin()
            for row in range(slot * beams, (slot + 1) * beams):
                rows.restart(row)
        for source, target in rows.remove([row for slot in empty for row in range(slot * beams, (slot + 1) * beams)]):
            active[target // beams] = active[source // beams]
        del active[len(rows) // beams :]
        for sentence in finished:
            counters.tokens += len(sentence.finished[0].tokens) if sentence.finished else 0
            yield sentence.index, sentence.finished


def _step(ensemble: Ensemble, rows: Rows, active: Sequence[Sentence], rules: Rules) -> None:
    """One token more for every beam, or a part of the prompt."""
    parts = prompt_parts(active)
    beams = [beam for sentence in active for beam in sentence.beams]
    # A beam without tokens is its sentence's first: its row reads the prompt.
    reading = [beam is not None and not beam.tokens for beam in beams]
    wanted = [int(beam is not None) for beam in beams]
    for row, sentence in enumerate(active):
        if any(sentence.unread):
            wanted[row * rules.beams] = 0

    def forward(number: int) -> Tensor | None:
        new = [
            parts[row // rules.beams][number] if reads else [] if beam is None else beam.tokens[-1:]
            for row, (beam, reads) in enumerate(zip(beams, reading))
        ]
        return rows.forward(number, new, wanted)

    logits = [of_member for of_member in rows.each(forward, len(beams)) if of_member is not None]
    if not logits:
        return
    count = min(rules.beams + len(rules.stops), logits[0].shape[1])
    best = iter(ensemble.best(logits, count))
    candidates = [next(best) if asked else [] for asked in wanted]
    for slot, sentence in enumerate(active):
        first = slot * rules.beams
        if any(wanted[first : first + rules.beams]):
            before = list(sentence.beams)
            sources = sentence.extend(candidates[first : first + rules.beams], rules)
            for target, source in enumerate(sources):
                if source is not None and source != target:
                    rows.branch(first + source, first + target, _equal(rows, sentence, before, source, target))
    if rules.explaining:
        _explain(ensemble, logits, wanted, active, rules)


def _explain(
    ensemble: Ensemble, logits: Sequence[Tensor], wanted: Sequence[int], active: Sequence[Sentence], rules: Rules
) -> None:
    """Why this step's tokens were taken; `wanted` says which rows have logits."""
    asked = [slot for slot in range(len(active)) if any(wanted[slot * rules.beams : (slot + 1) * rules.beams])]
    taken = [(sum(wanted[: slot * rules.beams + beam.row]), beam) for slot in asked for beam in active[slot].taken]
    if not taken:  # the searches were over without a further token
        return
    index_R = torch.tensor([row for row, _ in taken], device=logits[0].device)
    tokens, logprobs = [beam.tokens[-1] for _, beam in taken], [beam.logprobs[-1] for _, beam in taken]
    found = explain([of_member[index_R] for of_member in logits], ensemble.weights_N, tokens, logprobs)
    for (_, beam), explanation in zip(taken, found):
        beam.explanations.append(explanation)


def _equal(rows: Rows, sentence: Sentence, before: Sequence[Beam | None], source: int, target: int) -> list[int]:
    """How many positions two rows of a sentence share, for each member, given the beams that stood in them."""
    own, other = before[source], before[target]
    if own is None or other is None or not other.tokens:
        return rows.prefix_lengths
    pairs = enumerate(zip(own.tokens, other.tokens))
    common = next((at for at, (a, b) in pairs if a != b), len(own.tokens))
    return [len(prompt) + common for prompt in sentence.prompt]
