"""Beam search: the K most probable translations of one sentence.

    score = (sum of the log-probabilities of the tokens and of the stop token after them) / their number ** penalty

as fairseq (`--lenpen`), Marian (`--normalize`) and transformers (`length_penalty`) define it: generated tokens are
counted, the stop token among them, the prompt not. A hypothesis that reached the limit without a stop token is divided
by the number of tokens it has.

The search is that of transformers' `generate(num_beams=K, early_stopping=False)`, so that n-best lists are the same: at
each step the candidates of all K beams are sorted by their sums; those among the first K that end are finished, and the
best K that do not end continue. The search is over when K are finished and the best running sum, divided by its
present length, is no better than the worst of them (or at the limit). That rule is a heuristic: with a positive penalty
a running hypothesis could still win later.

Exactness needs few candidates: of each beam its best K that do not end and those that end among its best K, so
K + (number of stop tokens). Each beam has a KV slot. A beam's first continuation stays in its slot; a second one takes
the slot of a beam that ended or died, of which only the positions after their last common token are copied.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from decode.engine.sequence import FinishReason, Hypothesis, SamplingParams, TopLogprobs

if TYPE_CHECKING:
    from decode.engine.attribution import Explanation


@dataclass(frozen=True)
class Beam:
    """A running hypothesis: its tokens, their log-probabilities in nats, and the sum of those.

    parent: the beam's number from which the last token came.   explanations: of the tokens, where requested.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    parent: int = 0
    explanations: list[Explanation] = field(default_factory=list)

    def extended(self, token: int, logprob: float, parent: int) -> Beam:
        logprobs = [*self.logprobs, logprob]
        return Beam([*self.tokens, token], logprobs, self.total + logprob, parent, list(self.explanations))


@dataclass
class BeamSearch:
    """The search of one sequence.

    beams: by number, None where there is no beam.   finished: hypotheses, best first.   latest: the beams that the
    last step's tokens led to, running or finished.
    """

    params: SamplingParams
    stops: frozenset[int]
    limit: int
    beams: list[Beam | None] = field(default_factory=list)
    finished: list[Hypothesis] = field(default_factory=list)
    latest: list[Beam] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.beams = [Beam(), *[None] * (self.params.beams - 1)]

    @property
    def num_candidates(self) -> int:
        """Best tokens that each beam needs."""
        return self.params.beams + len(self.stops)

    @property
    def over(self) -> bool:
        return not any(self.beams)

    def last_token(self, number: int) -> list[int]:
        """A beam's last token, none where there is no beam or no token."""
        beam = self.beams[number]
        return [] if beam is None else beam.tokens[-1:]

    def extend(self, candidates: SequenceOf[TopLogprobs]) -> list[tuple[int, int, int]]:
        """Continue with the best candidates, given by beam; all beams are None when the search is over.

        Returns which slots change as (source, target, tokens that the beams of both had in common).
        """
        before = list(self.beams)
        running = [(number, beam) for number, beam in enumerate(before) if beam is not None]
        length = len(running[0][1].tokens) + 1
        ranked = sorted(
            (-(beam.total + logprob), number, token, logprob)
            for number, beam in running
            for token, logprob in candidates[number]
        )
        continued: list[Beam] = []
        self.latest = []
        for rank, (_, number, token, logprob) in enumerate(ranked):
            beam = before[number]
            assert beam is not None
            if token not in self.stops and length < self.limit:
                continued.append(beam.extended(token, logprob, number))
            elif rank < self.params.beams:
                self.latest.append(beam.extended(token, logprob, number))
                self._finish(self.latest[-1])
        del continued[self.params.beams :]
        self.beams = [None] * self.params.beams
        if self._is_over(continued):
            return []
        self.latest += continued
        others = []
        for beam in continued:
            if self.beams[beam.parent] is None:
                self.beams[beam.parent] = beam
            else:
                others.append(beam)
        free = [number for number, beam in enumerate(self.beams) if beam is None]
        copies = []
        for target, beam in zip(free, others):
            self.beams[target] = beam
            copies.append((beam.parent, target, _common(before[beam.parent], before[target])))
        return copies

    def _finish(self, beam: Beam) -> None:
        score = self._score(beam.total, len(beam.tokens))
        stopped = beam.tokens[-1] in self.stops
        tokens = beam.tokens[:-1] if stopped else beam.tokens
        reason: FinishReason = "stop" if stopped else "length"
        self.finished.append(Hypothesis(tokens, beam.logprobs, reason, score, beam.explanations))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier one first on ties
        del self.finished[self.params.beams :]

    def _is_over(self, continued: SequenceOf[Beam]) -> bool:
        if not continued:
            return True
        if len(self.finished) < self.params.beams:
            return False
        best = self._score(max(beam.total for beam in continued), len(continued[0].tokens))
        return best <= self.finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / length**self.params.length_penalty


def _common(source: Beam | None, target: Beam | None) -> int:
    """Tokens in common of the beams in two slots; -1 where the target's slot holds no more than the shared prefix."""
    if source is None or target is None or not target.tokens:
        return -1
    pairs = enumerate(zip(source.tokens, target.tokens))
    return next((at for at, (a, b) in pairs if a != b), len(source.tokens))
