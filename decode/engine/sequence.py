"""A request to the engine and its result: what is decoded, how its tokens are sampled, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from minillama.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from decode.engine.attribution import Explanation
    from decode.engine.beam import BeamSearch
    from decode.engine.kv_slots import Slot

MAX_BEAMS = 8
MIN_TEMPERATURE = 1e-6  # logits are divided by it in float32
MAX_DRAFT = 7  # tokens drafted at a time
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are sampled.

    temperature: 0 takes the most probable token.   top_k: sample among the k most probable tokens; 0: all.   top_p:
    sample among the most probable tokens that reach this probability together.   seed: the same seed gives the same
    tokens for a sequence in any batch.   beams: above 1 is beam search, whose score of a hypothesis is the sum of its
    log-probabilities divided by its number of tokens to the power of length_penalty.   nbest: hypotheses to return.
    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    nbest: int = 0

    def __post_init__(self) -> None:
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < math.inf:  # also refuses NaN
            raise InputError(f"temperature {self.temperature}: must be 0 (greedy), or {MIN_TEMPERATURE} or more")
        if not 0 <= self.top_k < 2**31 or not 0 < self.top_p <= 1:
            raise InputError(
                f"top_k {self.top_k} and top_p {self.top_p}: top_k must be 0 or more, top_p above 0 up to 1"
            )
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty {self.length_penalty} must be a finite number")
        if not 1 <= self.beams <= MAX_BEAMS:
            raise InputError(f"{self.beams} beams: 1 to {MAX_BEAMS} can be searched")
        if not 0 <= self.nbest <= self.beams:
            raise InputError(f"nbest {self.nbest}: {self.beams} beams give 1 to {self.beams} hypotheses")
        if self.temperature and self.is_search:
            raise InputError("a sequence is either sampled (temperature) or searched (beams), not both")

    @property
    def is_search(self) -> bool:
        return self.beams > 1 or self.nbest > 0

    @property
    def truncated(self) -> bool:
        """Whether sampling leaves tokens out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def signed_seed(self) -> int:
        """Any integer as an int64."""
        return (self.seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class Hypothesis:
    """An entry of an n-best list, see beam.py.

    logprobs: in nats, of the tokens and, where `finish_reason` is "stop", last of the stop token, which is not in
    `tokens`.   score: their sum divided by their number to the power of the length penalty.   explanations: where they
    were requested, one for each of `logprobs`.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    score: float
    explanations: list[Explanation] = field(default_factory=list)


# For one position the most probable tokens of the combined distribution, best first, with log-probabilities in nats.
TopLogprobs = list[tuple[int, float]]


@dataclass(frozen=True)
class Completion:
    """What a sequence came to.

    tokens, logprobs: new tokens without the stop token and their log-probabilities in nats under the combined
    distribution; of forced decoding the targets, and `logprobs` has one entry more where the ensemble has stop tokens:
    that any of them follows.   error: one line, for the finish reason "error".   hypotheses: the n-best list of beam
    search, of which the completion is the first.   explanations: where they were requested, one for each token and,
    with "stop", one for the stop token.   member_logprobs: of forced decoding, `logprobs` under each member's own
    distribution.   hidden: with keep_hidden, for each member (T, D) at the T positions whose next token is a target or
    the end.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    error: str = ""
    hypotheses: SequenceOf[Hypothesis] = ()
    explanations: SequenceOf[Explanation] = ()
    top_logprobs: SequenceOf[TopLogprobs] = ()
    member_logprobs: SequenceOf[list[float]] = ()
    hidden: SequenceOf[Tensor] = ()


@dataclass(frozen=True)
class Update:
    """The tokens that one sequence gained in a step, and its completion if it ended there."""

    id: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: SequenceOf[TopLogprobs] = ()
    completion: Completion | None = None


@dataclass(eq=False)
class Sequence:
    """One prompt per member, how its tokens are sampled, and the state of its decoding.

    prompts: token ids in the members' order.   max_new_tokens: fewer where a member's context ends before.
    stop_tokens: None: the ensemble's.   weights: of the members; 0 leaves a member out; None: the ensemble's.
    key: sampling is a function of seed, key, position and logits; None: the engine's id of the sequence.
    top_logprobs: so many of the best tokens are returned with each token, at most 32.   targets: tokens whose
    log-probabilities are requested (forced decoding), nothing is generated then; keep_hidden: return the members'
    hidden states instead.
    """

    prompts: tuple[list[int], ...]
    params: SamplingParams = SamplingParams()
    max_new_tokens: int = 256
    stop_tokens: frozenset[int] | None = None
    weights: tuple[float, ...] | None = None
    key: int | None = None
    explain: bool = False
    top_logprobs: int = 0
    targets: list[int] | None = None
    keep_hidden: bool = False

    # The state of decoding, which the engine sets. remaining: for each member the prompt tokens (and targets) that it
    # has not read yet; a member that is left out has none.
    id: int = -1
    stops: frozenset[int] = frozenset()
    limit: int = 0
    remaining: list[list[int]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    search: BeamSearch | None = None
    member_logprobs: list[list[float]] = field(default_factory=list)
    hidden: list[list[Tensor]] = field(default_factory=list)
    num_scored: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""

    @property
    def reads_prompt(self) -> bool:
        return any(self.remaining)

    def uses(self, member: int) -> bool:
        return self.weights is None or self.weights[member] != 0

    def positions(self, member: int) -> int:
        """KV positions that a member needs for this sequence at most; `limit` is known."""
        new = self.limit if self.targets is None else len(self.targets)
        return len(self.prompts[member]) + new

    def append(self, token: int, logprob: float, top: TopLogprobs) -> None:
        """One generated token; sets `finish_reason` where it is the last."""
        if token in self.stops:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.top_logprobs:
            self.top.append(top[: self.top_logprobs])
        if len(self.tokens) == self.limit:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        if self.search is not None and self.search.over and self.search.finished:
            best = self.search.finished[0]
            return Completion(
                best.tokens,
                best.logprobs[: len(best.tokens)],
                best.finish_reason,
                hypotheses=self.search.finished[: self.params.nbest or self.params.beams],
                explanations=best.explanations,
            )
        import torch  # here, so that a command line is checked without it

        return Completion(
            self.tokens if self.targets is None else self.targets,
            self.logprobs,
            self.finish_reason,
            self.error,
            explanations=self.explanations[: len(self.tokens) + (self.finish_reason == "stop")],
            top_logprobs=self.top,
            member_logprobs=self.member_logprobs,
            hidden=[torch.cat(parts) if parts else torch.empty(0, 0) for parts in self.hidden],
        )


@dataclass
class Stats:
    """What an engine did: steps of the whole ensemble, generated tokens, tokens drafted and those of them accepted.

    proposers: the latter two for each member that drafted, and for `lookup`.   first_token_time: time.perf_counter().
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    proposers: dict[str, tuple[int, int]] = field(default_factory=dict)
    first_token_time: float | None = None

    def add_draft(self, proposer: str, drafted: int, accepted: int) -> None:
        before = self.proposers.get(proposer, (0, 0))
        self.proposers[proposer] = before[0] + drafted, before[1] + accepted
        self.drafted += drafted
        self.accepted += accepted
