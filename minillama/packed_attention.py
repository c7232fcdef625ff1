"""Sequences packed into one row: attention within each sequence only, positions restarted.

No (T, T) mask is built. Queries, keys and values are gathered into a few buckets of sequences of similar length, causal
attention runs on each bucket, and the results are gathered back. A prefix that all sequences share is in the row once.
On a GPU with Triton, `flex_attention` computes the same on the row as it is.
"""

# T positions of the row  N sequences  R positions of all buckets  H heads  K key/value heads  C head width
# L positions of a bucket's sequences  P positions of the prefix

from collections.abc import Callable
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

# flex_attention refuses heads that are narrower than a matrix multiplication on a GPU.
MIN_FLEX_HEAD_WIDTH = 16
# With a prefix, a bucket's padding may grow its positions by this factor: some are wasted, fewer calls are made.
# Without a prefix, buckets of equal lengths are the row itself and nothing is moved.
MAX_PADDING = 1.25


@dataclass(frozen=True)
class PackedSequences:
    """`prefix` shared positions, then sequences of `lengths` positions, each of which continues the prefix."""

    lengths: tuple[int, ...]
    prefix: int = 0

    @property
    def total(self) -> int:
        """T, the positions of the row."""
        return self.prefix + sum(self.lengths)

    def positions(self, device: torch.device) -> Tensor:
        """(1, T) int64: the prefix counts from 0, each sequence from the end of the prefix."""
        segments = [np.arange(self.prefix), *(np.arange(length) + self.prefix for length in self.lengths)]
        return torch.from_numpy(np.concatenate(segments))[None].to(device)

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """(sequences, positions of each) in the row's order; every sequence's positions include the prefix."""
        max_padding = MAX_PADDING if self.prefix else 1.0
        found: list[tuple[int, int]] = []
        start = longest = filled = 0
        for number, length in enumerate(self.lengths):
            longer, more = max(longest, length + self.prefix), filled + length + self.prefix
            if longer * (number + 1 - start) > max_padding * more:
                found.append((number - start, longest))
                start, longer, more = number, length + self.prefix, length + self.prefix
            longest, filled = longer, more
        return [*found, (len(self.lengths) - start, longest)]

    def attention(self, device: torch.device, dtype: torch.dtype, width: int) -> "BucketAttention | FlexAttention":
        """Attention over this row for one forward, of heads of that width."""
        fits = device.type == "cuda" and dtype != torch.float64 and width >= MIN_FLEX_HEAD_WIDTH
        if fits and find_spec("triton"):
            from minillama.flex_attention import FlexAttention, block_mask, compiled

            return FlexAttention(block_mask(self.lengths, self.prefix, device), compiled())
        return self.bucket_attention(device)

    def bucket_attention(self, device: torch.device) -> "BucketAttention":
        """The buckets' index tensors on the device."""
        widths_N = np.repeat([width for _, width in self.buckets], [count for count, _ in self.buckets])
        start_N = np.cumsum(widths_N) - widths_N
        prefix_of_NP = start_N[:, None] + np.arange(self.prefix)
        bucket_of_T = np.arange(self.total)
        bucket_of_T[self.prefix :] += np.repeat(start_N + self.lengths - np.cumsum(self.lengths), self.lengths)
        row_of_R = np.zeros(widths_N.sum(), dtype=np.int64)  # padding copies row 0: its results are not read
        row_of_R[prefix_of_NP] = np.arange(self.prefix)
        row_of_R[bucket_of_T] = np.arange(self.total)
        reader_of_R = np.full_like(row_of_R, self.total)  # T is a row of zeros: no position reads this result
        reader_of_R[bucket_of_T] = np.arange(self.total)
        return BucketAttention(
            shapes=self.buckets,
            is_gathered=len(row_of_R) != self.total,
            prefix=self.prefix,
            row_of_R=torch.from_numpy(row_of_R).to(device),
            bucket_of_T=torch.from_numpy(bucket_of_T).to(device),
            reader_of_R=torch.from_numpy(reader_of_R).to(device),
            prefix_of_NP=torch.from_numpy(prefix_of_NP).to(device),
        )


@dataclass(frozen=True)
class BucketAttention:
    """Attention on buckets of sequences of similar length, and the indices between the row and the buckets."""

    shapes: list[tuple[int, int]]  # (sequences, positions of each)
    is_gathered: bool  # False where the buckets, one after another, are the row itself
    prefix: int
    row_of_R: Tensor  # the row's position that is copied to each position of the buckets
    bucket_of_T: Tensor  # where each position's result is read; the prefix's in the first sequence
    reader_of_R: Tensor  # the row's position that reads a result, T where none does
    prefix_of_NP: Tensor  # where the prefix is in each sequence

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Causal attention within each sequence; B is 1. Returns (1, H, T, C)."""
        queries, keys, values = (self._buckets(x_BHTC[0].transpose(0, 1)) for x_BHTC in (q_BHTC, k_BKTC, v_BKTC))
        grouped = q_BHTC.shape[1] != k_BKTC.shape[1]
        outs = []
        for q_NHLC, k_NKLC, v_NKLC in zip(queries, keys, values):
            out_NHLC = F.scaled_dot_product_attention(q_NHLC, k_NKLC, v_NKLC, is_causal=True, enable_gqa=grouped)
            outs.append(out_NHLC.transpose(1, 2).flatten(0, 1))
        out_RHC = torch.cat(outs) if len(outs) > 1 else outs[0]
        out_THC = _Gather.apply(out_RHC, self.bucket_of_T, self._to_results) if self.is_gathered else out_RHC
        return out_THC.transpose(0, 1)[None]

    def _buckets(self, x_THC: Tensor) -> list[Tensor]:
        x_RHC = _Gather.apply(x_THC, self.row_of_R, self._to_row) if self.is_gathered else x_THC
        buckets = x_RHC.split([count * width for count, width in self.shapes])
        return [bucket.unflatten(0, shape).transpose(1, 2) for bucket, shape in zip(buckets, self.shapes)]

    def _to_row(self, d_RHC: Tensor) -> Tensor:
        """The gradient of the row, from that of the buckets' positions."""
        d_THC = d_RHC.index_select(0, self.bucket_of_T)
        if self.prefix:
            d_NPHC = d_RHC.index_select(0, self.prefix_of_NP.flatten()).unflatten(0, self.prefix_of_NP.shape)
            torch.sum(d_NPHC, dim=0, out=d_THC[: self.prefix])
        return d_THC

    def _to_results(self, d_THC: Tensor) -> Tensor:
        """The gradient of the buckets' results, from that of the row."""
        zero_1HC = d_THC.new_zeros(1, *d_THC.shape[1:])
        return torch.cat((d_THC, zero_1HC)).index_select(0, self.reader_of_R)


class _Gather(torch.autograd.Function):
    """Its backward gathers too, where autograd would scatter: a fixed order of additions, so it is deterministic."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gather_gradient = backward
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.gather_gradient(d), None, None
