"""How examples lie in a forward pass: padded rows, or one row of documents packed one behind another.

A packed row has no padding, attention stays within each document, and the prefix that all documents share (the
instruction of a translation prompt) stands in it once. Loss and gradients are those of the documents one by one.
"""

# M targets  B rows  T positions of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minillama.packed_attention import PackedSequences

if TYPE_CHECKING:
    from train.data import Example

# The share of a row's positions that a shared prefix must save.
WORTH = 0.05


@dataclass(frozen=True)
class Batch:
    """One forward pass. target_rows_M index the flattened (B*T) hidden states that predict targets_M; all int64.

    Right-padded rows, one example each, or with `packed` a single row (1, T) of packed examples. targets_M may be
    empty (a rank with nothing to do in a step): loss and gradients are then zero.
    """

    inputs_BT: Tensor
    target_rows_M: Tensor
    targets_M: Tensor
    packed: PackedSequences | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.inputs_BT.to(device), self.target_rows_M.to(device), self.targets_M.to(device), self.packed
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Right-padded inputs, and the places of the hidden states that predict a target.

    The last token of an example is only ever a target, so inputs are one token shorter than the examples.
    """
    width = max(len(example.tokens) for example in examples) - 1
    inputs = np.zeros((len(examples), width), dtype=np.int64)
    rows, targets = [], []
    for number, example in enumerate(examples):
        tokens = np.asarray(example.tokens, dtype=np.int64)
        inputs[number, : len(tokens) - 1] = tokens[:-1]
        rows.append(np.arange(example.first_target - 1, len(tokens) - 1) + number * width)
        targets.append(tokens[example.first_target :])
    rows_M, targets_M = np.concatenate(rows), np.concatenate(targets)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(rows_M), torch.from_numpy(targets_M))


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """The number of first tokens that all rows have in common, but for the last of the shortest row."""
    least, most = min(rows), max(rows)  # what these two share, all do
    same = (one == other for one, other in zip(least, most))
    return min(sum(takewhile(bool, same)), min(map(len, rows)) - 1)


def pack(examples: Sequence[Example], share_prefix: bool = True) -> Batch:
    """One row: the inputs of all examples, shortest first, after the prefix that they share if that pays.

    A position of the prefix predicts the next token of every document, so it may stand in target_rows_M many times.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    prefix = shared_prefix([example.tokens[:-1] for example in examples]) if share_prefix else 0
    if not worth_sharing(prefix, [len(example.tokens) - 1 for example in examples]):
        prefix = 0
    inputs, rows, targets = [np.asarray(examples[0].tokens[:prefix], dtype=np.int64)], [], []
    end = prefix
    for example in examples:
        tokens = np.asarray(example.tokens, dtype=np.int64)
        own = len(tokens) - 1 - prefix
        inputs.append(tokens[prefix:-1])
        places = np.arange(example.first_target - 1, len(tokens) - 1)
        rows.append(np.where(places < prefix, places, places - prefix + end))
        targets.append(tokens[example.first_target :])
        end += own
    return Batch(
        torch.from_numpy(np.concatenate(inputs)[None]),
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(targets)),
        PackedSequences(tuple(len(example.tokens) - 1 - prefix for example in examples), prefix),
    )


def worth_sharing(prefix: int, lengths: Sequence[int]) -> bool:
    """Whether a shared prefix saves at least WORTH of the positions; `lengths` are those of the documents in full.

    It is then gathered into each document's attention, which on a CPU costs about what 3% of the positions do
    (SmolLM2's shape, 16 sentence pairs); rows without a prefix need no gathering.
    """
    return len(lengths) > 1 and prefix * (len(lengths) - 1) >= WORTH * sum(lengths)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places 0..len - 1 in bins of at most `capacity`: each goes, in order, where the least room is left over.

    Longer ones get a bin of their own. (Best fit: at most 1.7 times the fewest bins, Johnson et al., SIAM J. Comput.
    3, 1974; a few percent above it for text.)
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left, numbers of bins
    rooms = 0  # bit r is set where with_room[r] is not empty
    for place, length in enumerate(lengths):
        candidates = rooms >> length if length <= capacity else 0
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            bins[number].append(place)
        else:
            room, number = max(capacity, length), len(bins)
            bins.append([place])
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return bins
