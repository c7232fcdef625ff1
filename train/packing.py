"""Examples, and their layout in a forward pass: padded rows, or one row of packed examples.

A packed row has no padding, attention stays within each example, and a prefix that all examples share (the instruction
of a translation prompt) stands in it once. Loss and gradients are those of the examples one at a time.
"""

# M labels  B rows  T positions of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from minillama.packed_attention import PackedSequences

# A shared prefix must save at least this share of a row's positions. It is then gathered into the attention of each
# example, which on a CPU costs about as much as 3% of the positions (SmolLM2's shape, 16 sentence pairs).
MIN_PREFIX_SAVING = 0.05


@dataclass(frozen=True)
class Example:
    """Token ids. Those from `prompt_len` on are labels: the loss is on predicting them."""

    tokens: list[int]
    prompt_len: int

    @property
    def num_labels(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class Batch:
    """One forward pass. label_positions_M index the flattened (B*T) hidden states that predict labels_M; all int64.

    Right-padded rows, one example each, or with `packed` a single row (1, T) of packed examples. labels_M may be
    empty (a rank that has no example left in a step): loss and gradients are then zero.
    """

    inputs_BT: Tensor
    label_positions_M: Tensor
    labels_M: Tensor
    packed: PackedSequences | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.inputs_BT.to(device), self.label_positions_M.to(device), self.labels_M.to(device), self.packed
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Right-padded rows. They are one token shorter than the examples, whose last token is only a label."""
    width = max(len(example.tokens) for example in examples) - 1
    inputs_BT = np.zeros((len(examples), width), dtype=np.int64)
    positions, labels = [], []
    for row, example in enumerate(examples):
        tokens = np.asarray(example.tokens, dtype=np.int64)
        inputs_BT[row, : len(tokens) - 1] = tokens[:-1]
        positions.append(np.arange(example.prompt_len - 1, len(tokens) - 1) + row * width)
        labels.append(tokens[example.prompt_len :])
    positions_M, labels_M = np.concatenate(positions), np.concatenate(labels)
    return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(positions_M), torch.from_numpy(labels_M))


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """The number of first tokens that all rows have in common, without the last of the shortest row."""
    first, last = min(rows), max(rows)  # what the first and the last in order share, all share
    common = sum(takewhile(bool, (one == other for one, other in zip(first, last))))
    return min(common, min(map(len, rows)) - 1)


def pack(examples: Sequence[Example], share_prefix: bool = True) -> Batch:
    """One row: the prefix that all examples share, if that saves enough, then the rest of each, shortest first.

    A position of the prefix predicts the next token of every example, so label_positions_M may hold it many times.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    inputs = [example.tokens[:-1] for example in examples]
    prefix = shared_prefix(inputs) if share_prefix and len(inputs) > 1 else 0
    if prefix * (len(inputs) - 1) < MIN_PREFIX_SAVING * sum(map(len, inputs)):
        prefix = 0
    row, positions, labels = [np.asarray(inputs[0][:prefix], dtype=np.int64)], [], []
    end = prefix
    for example in examples:
        tokens = np.asarray(example.tokens, dtype=np.int64)
        row.append(tokens[prefix:-1])
        own = np.arange(example.prompt_len - 1, len(tokens) - 1)
        positions.append(np.where(own < prefix, own, own - prefix + end))
        labels.append(tokens[example.prompt_len :])
        end += len(row[-1])
    return Batch(
        torch.from_numpy(np.concatenate(row)[None]),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(labels)),
        PackedSequences(tuple(len(tokens) - prefix for tokens in inputs), prefix),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices 0..len - 1 in bins of at most `capacity`: each goes, in order, to the bin that it fills most.

    A length above `capacity` gets a bin of its own. (Best fit: at most 1.7 times the fewest bins, Johnson et al., SIAM
    J. Comput. 3, 1974; a few percent more than the fewest for text.)
    """
    bins: list[list[int]] = []
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if bins_by_room[r] is not empty
    for index, length in enumerate(lengths):
        candidates = rooms >> length if length <= capacity else 0
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms &= ~(1 << room)
            bins[number].append(index)
        else:
            room, number = max(capacity, length), len(bins)
            bins.append([index])
        left = room - length
        if left:
            bins_by_room[left].append(number)
            rooms |= 1 << left
    return bins
