"""Documents packed one behind another in a row: attention within each only, positions from its own start.

No (T, T) mask anywhere. On the CPU the rows of queries, keys and values are gathered into a few rectangles of documents
of like length, causal attention runs over each, and the results are gathered back. A prefix that all documents share
stands in the row once: it takes part in every document's attention, all else is computed once for it.
"""

# T positions of the row  N documents  R rows of a rectangle's documents  H heads  C head width

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A rectangle may hold this many positions for one that is some document's: more of it is wasted, fewer calls are made.
SLACK = 1.25


@dataclass(frozen=True)
class Documents:
    """`prefix` shared positions, then documents of `lengths` positions each, all behind the prefix."""

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
        """(documents, width) of each rectangle; documents are taken in the row's order."""
        found: list[tuple[int, int]] = []
        start = 0
        for end in range(1, len(self.lengths) + 1):
            if end < len(self.lengths):
                group = self.lengths[start : end + 1]
                filled = sum(group) + self.prefix * len(group)
                if (max(group) + self.prefix) * len(group) <= SLACK * filled:
                    continue
            found.append((end - start, max(self.lengths[start:end]) + self.prefix))
            start = end
        return found

    def layout(self, device: torch.device) -> "Layout":
        """Where each position of the row stands in the rectangles, for one forward pass."""
        gather, back, prefix_at = [], [], []
        row, place, number = self.prefix, 0, 0
        for count, width in self.rectangles:
            for length in self.lengths[number : number + count]:
                rows = np.zeros(width, dtype=np.int64)  # padding is row 0: nobody looks at what it becomes
                rows[: self.prefix] = np.arange(self.prefix)
                rows[self.prefix : self.prefix + length] = np.arange(row, row + length)
                gather.append(rows)
                prefix_at.append(place)
                back.append(np.arange(place + self.prefix, place + self.prefix + length))
                row, place, number = row + length, place + width, number + 1
        own_R = np.concatenate(back)
        return Layout(
            shapes=self.rectangles,
            prefix=self.prefix,
            gather_R=torch.from_numpy(np.concatenate(gather)).to(device),
            back_T=torch.from_numpy(np.concatenate([np.arange(self.prefix) + prefix_at[0], own_R])).to(device),
            prefix_NP=(torch.tensor(prefix_at)[:, None] + torch.arange(self.prefix)).to(device),
            trivial=place == self.total,
        )


@dataclass(frozen=True)
class Layout:
    """Index tensors of one `Documents` on a device. `trivial`: the row is the rectangles, nothing has to move."""

    shapes: list[tuple[int, int]]
    prefix: int
    gather_R: Tensor
    back_T: Tensor
    prefix_NP: Tensor
    trivial: bool

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Causal attention within each document; B is 1. Returns (1, H, T, C)."""
        parts = [self._rectangles(x_BHTC) for x_BHTC in (q_BHTC, k_BKTC, v_BKTC)]
        grouped = q_BHTC.shape[1] != k_BKTC.shape[1]
        outs = []
        for q_NHLC, k_NKLC, v_NKLC in zip(*parts):
            out_NHLC = F.scaled_dot_product_attention(q_NHLC, k_NKLC, v_NKLC, is_causal=True, enable_gqa=grouped)
            outs.append(out_NHLC.transpose(1, 2).flatten(0, 1))
        out_RHC = torch.cat(outs) if len(outs) > 1 else outs[0]
        out_THC = out_RHC if self.trivial else out_RHC[self.back_T]
        return out_THC.transpose(0, 1)[None]

    def _rectangles(self, x_BHTC: Tensor) -> list[Tensor]:
        x_THC = x_BHTC[0].transpose(0, 1)
        if not self.trivial:
            x_THC = x_THC[self.gather_R]
        parts = x_THC.split([count * width for count, width in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes)]
