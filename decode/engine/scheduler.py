"""Which sequences run, and which of their tokens are computed in a step.

Sequences start in the order in which they were added, as soon as enough slots are free. A prompt is read in chunks, in
the same steps in which other sequences decode, so that a long one does not delay them.
"""

from __future__ import annotations

from collections import deque

from decode.engine.kv_slots import KVSlots, Slot
from decode.engine.model_runner import SlotInput
from decode.engine.sequence import Sequence

# Positions of prompts that one step computes, counted in the member with the longest prompt.
MAX_PROMPT_POSITIONS = 512


class Scheduler:
    """`waiting` sequences in order, and the `running` ones by id; a running one holds a slot for each of its beams."""

    def __init__(self, slots: KVSlots) -> None:
        self.slots = slots
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[SlotInput]:
        """Start what fits, then for each slot in use the tokens that it reads now, in the order of the slots."""
        while self.waiting and self.slots.free >= self.waiting[0].params.beams:
            self._start(self.waiting.popleft())
        budget = MAX_PROMPT_POSITIONS
        inputs = []
        for slot in self.slots.used:
            if slot.sequence.reads_prompt:
                entry, used = _prompt_chunk(slot, budget)
                budget -= used
            else:
                entry = _next_token(slot)
            if entry is not None:
                inputs.append(entry)
        return inputs

    def finish(self, sequence: Sequence) -> None:
        """Free the slots of a sequence; one that still waits leaves the queue."""
        if self.running.pop(sequence.id, None) is None:
            self.waiting.remove(sequence)
        self.slots.release(sequence)

    def _start(self, sequence: Sequence) -> None:
        for _ in range(sequence.params.beams):
            self.slots.allocate(sequence)
        self.running[sequence.id] = sequence
        held = sequence.slots[0].lengths
        # After a target nothing is generated, so the last one is read only where its end is scored.
        targets = sequence.targets or []
        text = targets if sequence.stops else targets[:-1]
        sequence.remaining = [
            [*prompt[length:], *text] if sequence.uses(member) else []
            for member, (prompt, length) in enumerate(zip(sequence.prompts, held))
        ]


def _prompt_chunk(slot: Slot, budget: int) -> tuple[SlotInput | None, int]:
    """The next positions of a prompt, at most `budget` of the member with the longest, and how many those are.

    All members come to the end of their prompts in the same step; a shorter prompt waits for the longer ones.
    """
    sequence = slot.sequence
    longest = max(map(len, sequence.remaining))
    if slot.number > 0 or not budget:  # the other beams start from the first
        return None, 0
    left = longest - min(longest, budget)
    chunk = [tokens[: max(0, len(tokens) - left)] for tokens in sequence.remaining]
    sequence.remaining = [tokens[len(read) :] for tokens, read in zip(sequence.remaining, chunk)]
    if sequence.targets is None:
        num_logits = int(left == 0)
    else:  # logits are needed where the next token is a target or the end
        num_positions = len(sequence.targets) + bool(sequence.stops)
        reached = max(0, num_positions - left)
        num_logits, sequence.num_scored = reached - sequence.num_scored, reached
    return SlotInput(slot, chunk, num_logits), longest - left


def _next_token(slot: Slot) -> SlotInput | None:
    """The last token of a sequence or beam; None for a slot without a beam."""
    sequence = slot.sequence
    last = sequence.tokens[-1:] if sequence.search is None else sequence.search.last_token(slot.number)
    if not last:
        return None
    return SlotInput(slot, [last if sequence.uses(n) else [] for n in range(len(sequence.prompts))], 1)
