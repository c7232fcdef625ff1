"""Speculative decoding for any combination of members, exact.

Several tokens of a sequence are verified in one forward pass of every member: where reading weights is what a pass
costs, that is cheaper than a pass for each. The combined distribution chooses a token at every drafted position, and
the longest prefix of the draft that equals these tokens is accepted, with the token after it: the tokens are those of
plain decoding, whatever proposed the draft. A sample is a function of (seed, key, position) and the logits, so that
holds for sampling too.

Proposers are the members, whose passes are needed anyway, and prompt lookup (n-grams): the tokens that followed the
last occurrence of the last tokens in the prompt or the output.

`auto` drafts where the expected speed-up (Leviathan, Kalman and Matias 2023, theorem 3.8) is above MIN_SPEEDUP, from
the measured acceptance rate and the bytes of weights that a pass of each member reads: no clock, so a run can be
repeated. A member's draft ends before a token at which the probability of the whole draft, by the member's own
distribution, falls below MIN_CONFIDENCE.
"""

# R positions  V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from decode.engine.model_runner import ModelRunner, SamplerOutput, SlotInput
from decode.engine.sequence import MAX_DRAFT, Sequence
from minillama import InputError

# `auto` considers drafts of these lengths, for at most so many sequences: beyond, weights are not what a pass costs.
LENGTHS = (1, 3, MAX_DRAFT)
MAX_SEQUENCES = 4
MIN_SPEEDUP = 1.15
MIN_CONFIDENCE = 0.4
# The cost of one more position in a pass of all members, as a part of a pass of one position.
POSITION_COST = 0.08
# Comparisons before an acceptance rate is used, the weight of older ones, and steps between comparisons in plain steps.
ENOUGH, DECAY, OBSERVE_EVERY = 12, 0.99, 16
# Lengths of the n-grams of prompt lookup, the longest first.
NGRAMS = (3, 2)
LOOKUP = "lookup"


@dataclass
class Acceptance:
    """How often a proposer's token was the sampled one, over about the last hundred comparisons."""

    accepted: float = 0.0
    seen: float = 0.0

    @property
    def known(self) -> bool:
        return self.seen >= ENOUGH

    @property
    def rate(self) -> float:
        return self.accepted / self.seen if self.seen else 0.0

    def add(self, accepted: bool) -> None:
        self.accepted = DECAY * self.accepted + accepted
        self.seen = DECAY * self.seen + 1


@dataclass(frozen=True)
class Draft:
    """The proposer of a step's drafts: a member, with its logits (R, V) at all positions, or prompt lookup."""

    member: int | None
    logits: Tensor | None = None


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a step with a draft of this length gains on average (equation 1 of the paper)."""
    return sum(acceptance**count for count in range(length + 1))


class Speculation:
    """What is drafted in each step of an engine. mode: `auto`, or a number of tokens that is always drafted."""

    def __init__(self, runner: ModelRunner, mode: str | int) -> None:
        self.runner, self.mode = runner, mode
        self.least_confidence = MIN_CONFIDENCE if mode == "auto" else 0.0
        weights = [model.nbytes for model in runner.models]
        # A single member's draft would be the sampled token itself.
        self.costs = {n: size / sum(weights) for n, size in enumerate(weights)} if len(weights) > 1 else {}
        self.acceptance = {proposer: Acceptance() for proposer in (None, *self.costs)}
        self.indexes: dict[int, NGramIndex] = {}
        self.matches: dict[int, list[int]] = {}  # by sequence the tokens that prompt lookup proposes in this step
        self.steps = 0

    def propose(self, inputs: SequenceOf[SlotInput]) -> Draft | None:
        """Add drafted tokens to the inputs of sequences that decode; None: this is a plain step."""
        self.steps += 1
        self.matches = {}
        decoding = [entry for entry in inputs if entry.sequence.tokens]
        other_kinds = any(e.sequence.search or e.sequence.targets is not None or e.sequence.weights for e in inputs)
        if not decoding or other_kinds or (self.mode == "auto" and len(inputs) > MAX_SEQUENCES):
            return None
        self._look_up(decoding)
        member, length = self._plan(len(decoding))
        if not length:
            return None
        if member is not None:
            return Draft(member, self._draft(member, length, inputs, decoding))
        for entry in decoding:
            entry.extend(self.matches[entry.sequence.id][:length])
        return Draft(None) if any(entry.draft for entry in decoding) else None

    def update(self, inputs: SequenceOf[SlotInput], draft: Draft | None, output: SamplerOutput) -> None:
        """Learn from the tokens that were sampled in this step."""
        row = 0
        for entry in inputs:
            for proposed, sampled in zip(entry.draft, output.tokens[row : row + entry.num_logits]):
                assert draft is not None
                self.acceptance[draft.member].add(proposed == sampled)
                if proposed != sampled:
                    break
            match = self.matches.get(entry.sequence.id)
            if match and (draft is None or draft.member is not None):
                self.acceptance[None].add(match[0] == output.tokens[row])
            row += entry.num_logits
        if draft is None and self.matches:
            self._observe(inputs, output)

    def name(self, draft: Draft) -> str:
        return LOOKUP if draft.member is None else self.runner.ensemble.names[draft.member]

    def _plan(self, sequences: int) -> tuple[int | None, int]:
        """The proposer with the largest expected speed-up, and how many tokens it drafts; 0: none."""
        share = sum(map(bool, self.matches.values())) / sequences
        best = MIN_SPEEDUP if self.mode == "auto" else 0.0
        plan: tuple[int | None, int] = (None, 0)
        for proposer, acceptance in self.acceptance.items():
            if not acceptance.known or (proposer is None and not share):
                continue
            of_all = 1.0 if proposer is not None else share
            for length in LENGTHS if self.mode == "auto" else [int(self.mode)]:
                gain = 1 + (expected_tokens(acceptance.rate, length) - 1) * of_all
                cost = 1 + length * (
                    (self.costs[proposer] if proposer is not None else 0.0) + sequences * of_all * POSITION_COST
                )
                if gain / cost > best:
                    best, plan = gain / cost, (proposer, length)
        return plan

    def _look_up(self, decoding: SequenceOf[SlotInput]) -> None:
        known = {entry.sequence.id for entry in decoding}
        self.indexes = {number: index for number, index in self.indexes.items() if number in known}
        for sequence in (entry.sequence for entry in decoding):
            index = self.indexes.get(sequence.id)
            if index is None:
                index = self.indexes[sequence.id] = NGramIndex(sequence.prompts[0])
            self.matches[sequence.id] = index.next(sequence.tokens, _room(sequence, MAX_DRAFT))

    def _observe(self, inputs: SequenceOf[SlotInput], output: SamplerOutput) -> None:
        """Compare what each member would have proposed with what was sampled, in a step without drafts."""
        positions = [(entry.sequence, 0) for entry in inputs if entry.num_logits]
        alone = torch.ones(1, device=self.runner.device)
        for member in self.costs:
            acceptance = self.acceptance[member]
            if acceptance.known and self.steps % OBSERVE_EVERY:
                continue
            own = self.runner.sample([output.logits[member]], positions, weights=alone)
            for token, logprob, sampled in zip(own.tokens, own.logprobs, output.tokens):
                if math.exp(logprob) >= self.least_confidence:
                    acceptance.add(token == sampled)

    def _draft(
        self, member: int, length: int, inputs: SequenceOf[SlotInput], decoding: SequenceOf[SlotInput]
    ) -> Tensor:
        """Let a member propose its own next tokens; its logits (R, V) at all positions whose logits are needed.

        It reads its own last token too: the logits after it are needed if the whole draft is accepted.
        """
        confidence = {entry.sequence.id: 1.0 for entry in decoding}
        drafts: dict[int, list[int]] = {entry.sequence.id: [] for entry in decoding}
        alone = torch.ones(1, device=self.runner.device)
        pieces, rows = [], []
        current = inputs
        while True:
            hidden_RD = self.runner.hidden(member, current)
            assert hidden_RD is not None  # a sequence that decodes reads its last token
            pieces.append(self.runner.logits(member, hidden_RD))
            needed = [entry for entry in current if entry.num_logits]
            rows += [(entry.slot.index, len(drafts.get(entry.sequence.id, ()))) for entry in needed]
            positions = [(entry.sequence, len(drafts.get(entry.sequence.id, ()))) for entry in needed]
            if all(sequence.id not in drafts or at == _room(sequence, length) for sequence, at in positions):
                break
            own = self.runner.sample([pieces[-1]], positions, weights=alone)
            current = []
            for entry, (sequence, at), token, logprob in zip(needed, positions, own.tokens, own.logprobs):
                if sequence.id in drafts and at < _room(sequence, length):
                    confidence[sequence.id] *= math.exp(logprob)
                    if confidence[sequence.id] >= self.least_confidence:
                        drafts[sequence.id].append(token)
                        tokens = [[token] if n == member else [] for n in range(len(entry.tokens))]
                        current.append(SlotInput(entry.slot, tokens, 1))
            if not current:
                break
        for entry in decoding:
            entry.extend(drafts[entry.sequence.id])
        order = sorted(range(len(rows)), key=rows.__getitem__)  # slot after slot, as the other members give them
        return torch.cat(pieces)[torch.tensor(order, device=pieces[0].device)]


class NGramIndex:
    """Where what followed each n-gram of a prompt and the output after it begins; the latest occurrence counts."""

    def __init__(self, prompt: SequenceOf[int]) -> None:
        self._tokens: list[int] = []
        self._generated = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._append(prompt)

    def next(self, generated: SequenceOf[int], length: int) -> list[int]:
        """Up to `length` tokens that followed the last n-gram before; `generated` has grown since the last call."""
        self._append(generated[self._generated :])
        self._generated = len(generated)
        for width in NGRAMS:
            start = self._after.get(tuple(self._tokens[-width:])) if len(generated) >= width else None
            if start is not None:
                return self._tokens[start : start + length]
        return []

    def _append(self, tokens: SequenceOf[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for width in NGRAMS:
                if end >= width:
                    self._after[tuple(self._tokens[end - width :])] = end
            self._tokens.append(token)


def check_mode(mode: str | int) -> str | int:
    """`off`, `auto`, or a number of tokens, perhaps as text; raises InputError for anything else."""
    if mode in ("off", "auto"):
        return mode
    try:
        number = int(mode)
    except ValueError:
        raise InputError(f"speculate {mode}: expected auto, off or a number of tokens") from None
    if not 1 <= number <= MAX_DRAFT:
        raise InputError(f"speculate {mode}: 1 to {MAX_DRAFT} tokens can be drafted at a time")
    return number


def _room(sequence: Sequence, length: int) -> int:
    """Tokens that may be drafted: a token is sampled after them, within the limit."""
    return max(0, min(length, sequence.limit - len(sequence.tokens) - 1))
