"""Documents packed one behind another in a row: attention within each only, positions from its own start.

No (T, T) mask anywhere. Queries, keys and values are gathered into a few rectangles of documents of like length, causal
attention runs over each, and the results are gathered back. A prefix that all documents share stands in the row once:
all else is computed once for it, and it is gathered into every document's attention. On a GPU `flex_attention` does the
same on the row as it is, where the compiler can build it.
"""

# T positions of the row  N documents  R positions of all rectangles  H heads  K key/value heads  C head width
# L positions of a rectangle's rows  P positions of the prefix

import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from minillama.flex_attention import FlexAttention

# COLLAB_PACKED=rectangles keeps a GPU from compiling flex_attention: another way to the same numbers.
FORCE_RECTANGLES = os.environ.get("COLLAB_PACKED") == "rectangles"
# flex_attention refuses heads that are narrower than a matrix product on a GPU.
FLEX_LEAST_WIDTH = 16
# With a prefix a rectangle may hold this many positions for one of some document: more is wasted, fewer calls are made.
# Without one, rectangles of equal lengths are the row itself and nothing has to be moved.
SLACK = 1.25


@dataclass(frozen=True)
class Documents:
    """`prefix` shared positions, then documents of `lengths` positions each, all of which go on from the prefix."""

    lengths: tuple[int, ...]
    prefix: int = 0

    @property
    def total(self) -> int:
        return self.prefix + sum(self.lengths)

    def positions(self, device: torch.device) -> Tensor:
        """(1, T) int64: the prefix counts from 0, each document goes on from its end."""
        parts = [np.arange(self.prefix), *(np.arange(length) + self.prefix for length in self.lengths)]
        return torch.from_numpy(np.concatenate(parts))[None].to(device)

    @cached_property
    def rectangles(self) -> list[tuple[int, int]]:
        """(documents, positions of each) in the row's order; the prefix counts in every document."""
        slack = SLACK if self.prefix else 1.0
        found: list[tuple[int, int]] = []
        start = longest = filled = 0
        for number, length in enumerate(self.lengths):
            longer, more = max(longest, length + self.prefix), filled + length + self.prefix
            if longer * (number + 1 - start) > slack * more:
                found.append((number - start, longest))
                start, longer, more = number, length + self.prefix, length + self.prefix
            longest, filled = longer, more
        return [*found, (len(self.lengths) - start, longest)]

    def attention(self, device: torch.device, dtype: torch.dtype, width: int) -> "PackedAttention | FlexAttention":
        """Attention over this row for one forward pass, of heads of that width."""
        fits = device.type == "cuda" and dtype != torch.float64 and width >= FLEX_LEAST_WIDTH
        if fits and find_spec("triton") and not FORCE_RECTANGLES:
            from minillama.flex_attention import FlexAttention, block_mask, compiled

            return FlexAttention(block_mask(self.lengths, self.prefix, device), compiled())
        return self.in_rectangles(device)

    def in_rectangles(self, device: torch.device) -> "PackedAttention":
        """The index tensors of the rectangles, on the device."""
        row_of_R, place_of_T, prefix_of_NP = [], [], []
        head = np.arange(self.prefix)
        row, place, number = self.prefix, 0, 0
        for count, width in self.rectangles:
            for length in self.lengths[number : number + count]:
                padding = np.zeros(width - self.prefix - length, dtype=np.int64)  # row 0: nobody reads what it becomes
                row_of_R += [head, np.arange(row, row + length), padding]
                place_of_T.append(np.arange(self.prefix, self.prefix + length) + place)
                prefix_of_NP.append(head + place)
                row, place, number = row + length, place + width, number + 1
        own_T = np.concatenate([prefix_of_NP[0], *place_of_T])
        owner_R = np.full(place, self.total)  # the zero row behind the others: its gradient is no one's
        owner_R[own_T] = np.arange(self.total)
        return PackedAttention(
            shapes=self.rectangles,
            moves=place != self.total,
            prefix=self.prefix,
            row_of_R=torch.from_numpy(np.concatenate(row_of_R)).to(device),
            place_of_T=torch.from_numpy(own_T).to(device),
            owner_of_R=torch.from_numpy(owner_R).to(device),
            prefix_of_NP=torch.from_numpy(np.stack(prefix_of_NP)).to(device),
        )


@dataclass(frozen=True)
class PackedAttention:
    """How a row lies in rectangles. `moves`: False where the row is the rectangles, end to end."""

    shapes: list[tuple[int, int]]
    moves: bool
    prefix: int
    row_of_R: Tensor  # the row's position that stands at each place of the rectangles
    place_of_T: Tensor  # where each position's result is read; the prefix's from the first document
    owner_of_R: Tensor  # the position that reads a place's result, T: none does
    prefix_of_NP: Tensor  # where the prefix stands in each document

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Causal attention within each document; B is 1. Returns (1, H, T, C)."""
        queries, keys, values = (self._rectangles(x_BHTC[0].transpose(0, 1)) for x_BHTC in (q_BHTC, k_BKTC, v_BKTC))
        grouped = q_BHTC.shape[1] != k_BKTC.shape[1]
        outs = []
        for q_NHLC, k_NKLC, v_NKLC in zip(queries, keys, values):
            out_NHLC = F.scaled_dot_product_attention(q_NHLC, k_NKLC, v_NKLC, is_causal=True, enable_gqa=grouped)
            outs.append(out_NHLC.transpose(1, 2).flatten(0, 1))
        out_RHC = torch.cat(outs) if len(outs) > 1 else outs[0]
        out_THC = _FromRectangles.apply(out_RHC, self) if self.moves else out_RHC
        return out_THC.transpose(0, 1)[None]

    def _rectangles(self, x_THC: Tensor) -> list[Tensor]:
        x_RHC = _ToRectangles.apply(x_THC, self) if self.moves else x_THC
        parts = x_RHC.split([count * width for count, width in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes)]


class _ToRectangles(torch.autograd.Function):
    """Gathers backward too, where autograd would scatter: in a fixed order, so the same bits every time, and fast."""

    @staticmethod
    def forward(ctx, x_THC: Tensor, packed: PackedAttention) -> Tensor:
        ctx.packed = packed
        return x_THC.index_select(0, packed.row_of_R)

    @staticmethod
    def backward(ctx, d_RHC: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        packed = ctx.packed
        d_THC = d_RHC.index_select(0, packed.place_of_T)
        if packed.prefix:
            d_NPHC = d_RHC.index_select(0, packed.prefix_of_NP.flatten()).unflatten(0, packed.prefix_of_NP.shape)
            torch.sum(d_NPHC, dim=0, out=d_THC[: packed.prefix])
        return d_THC, None


class _FromRectangles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_RHC: Tensor, packed: PackedAttention) -> Tensor:
        ctx.packed = packed
        return out_RHC.index_select(0, packed.place_of_T)

    @staticmethod
    def backward(ctx, d_THC: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        nothing_1HC = d_THC.new_zeros(1, *d_THC.shape[1:])
        return torch.cat((d_THC, nothing_1HC)).index_select(0, ctx.packed.owner_of_R), None
