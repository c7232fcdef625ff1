"""The KV slots of all members: which are in use, and how many positions each holds. Nothing else knows a length.

The slots in use always are 0 .. n-1 of every cache, so that a forward pass reads adjacent memory: when one is released,
the last moves into its place. A member may hold more positions of a sequence than another, as a draft model does. What
all prompts begin with is held once, in a slot after the others, and copied into each new slot.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decode.engine.sequence import Sequence

if TYPE_CHECKING:
    from decode.model.packed_llama import PackedLlama


@dataclass(eq=False)
class Slot:
    """One slot of every member's cache.

    index: in the caches; it may change between steps.   lengths: positions held, for each member.   number: which of
    its sequence's slots it is.   prefix: positions that it held when it was allocated.
    """

    index: int
    lengths: list[int]
    sequence: Sequence
    number: int
    prefix: list[int]


class KVSlots:
    """`count` slots of `capacity[n]` positions in a cache for each member n.

    prefix: for each member the tokens that a sequence's prompt may begin with; the model runner computes them and
    stores them in slot `shared`.
    """

    def __init__(
        self,
        models: SequenceOf[PackedLlama],
        count: int,
        capacity: SequenceOf[int],
        prefix: SequenceOf[list[int]],
    ) -> None:
        self.count, self.capacity, self.prefix = count, list(capacity), prefix
        self.shared = count
        extra = int(any(prefix))
        self.caches = [model.cache(count + extra, positions) for model, positions in zip(models, capacity)]
        self.used: list[Slot] = []

    @property
    def free(self) -> int:
        return self.count - len(self.used)

    def allocate(self, sequence: Sequence) -> Slot:
        """A slot for a sequence, which holds the shared prefix for each member whose prompt begins with it."""
        index = len(self.used)
        held = [0] * len(self.caches)
        for member, (cache, prefix) in enumerate(zip(self.caches, self.prefix)):
            prompt = sequence.prompts[member]
            if prefix and sequence.uses(member) and len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix:
                cache.copy_row(self.shared, index, len(prefix))
                held[member] = len(prefix)
        slot = Slot(index, list(held), sequence, len(sequence.slots), held)
        self.used.append(slot)
        sequence.slots.append(slot)
        return slot

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slots; the last ones in use move into the gaps."""
        for slot in sorted(sequence.slots, key=lambda slot: -slot.index):
            self._clear(slot)
            last = self.used.pop()
            if last is not slot:
                for cache, length in zip(self.caches, last.lengths):
                    cache.copy_row(last.index, slot.index, length)
                self._clear(last)
                last.index = slot.index
                self.used[last.index] = last
        sequence.slots = []

    def truncate(self, slot: Slot, count: int, clear: bool = False) -> None:
        """Drop the last `count` positions of every member that reads the sequence; clear: they may hold NaN."""
        if clear:
            for cache, length in zip(self.caches, slot.lengths):
                cache.entries_LBSEKC[:, slot.index, max(0, length - count) : length] = 0
        slot.lengths = [length - count if length else 0 for length in slot.lengths]

    def copy(self, source: Slot, target: Slot, common: SequenceOf[int]) -> None:
        """Slot `target` becomes equal to `source`. common: for each member the positions that the two share already;
        only those after them are copied.
        """
        for cache, first, length in zip(self.caches, common, source.lengths):
            entries_LBSEKC = cache.entries_LBSEKC
            entries_LBSEKC[:, target.index, first:length] = entries_LBSEKC[:, source.index, first:length]
        target.lengths = list(source.lengths)

    def _clear(self, slot: Slot) -> None:
        """Zero what a sequence leaves if it may hold NaN: attention multiplies masked values by 0, which keeps NaN."""
        if slot.sequence.reads_prompt or slot.sequence.finish_reason in ("error", "cancelled"):
            for cache, length in zip(self.caches, slot.lengths):
                cache.entries_LBSEKC[:, slot.index, :length] = 0

    def check_room(self, sequence: Sequence) -> str:
        """Why a sequence does not fit a slot; empty if it does."""
        for member, capacity in enumerate(self.capacity):
            if sequence.uses(member) and sequence.positions(member) > capacity:
                return f"needs {sequence.positions(member)} positions, a slot has {capacity}"
        return ""
