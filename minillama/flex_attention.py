"""Packed attention on a GPU: `flex_attention` over the row as it is, its blocks chosen on the host from the lengths.

PyTorch's own way to a block mask evaluates all T x T pairs; here a block is listed because the documents say so.
Nothing is moved: the prefix that documents share is read where it stands.
"""

# T positions of the row  S blocks of the row  H heads  K key/value heads  C head width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def visible_blocks(lengths: Sequence[int], prefix: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, S) bool twice, queries by keys: the blocks in which something is visible in part, and those wholly visible.

    A query sees the keys before it in its own document and in the prefix, and itself.
    """
    ends = np.cumsum(lengths) + prefix
    total = int(ends[-1])
    count = -(-total // block)
    partly, wholly = np.zeros((count, count), dtype=bool), np.zeros((count, count), dtype=bool)
    starts = np.concatenate([[0], ends - lengths]) if prefix else ends - lengths
    for query in range(count):
        first, last = query * block, min(total, (query + 1) * block) - 1
        start = int(starts[np.searchsorted(starts, first, side="right") - 1])  # of the first query's document
        alone = start == int(starts[np.searchsorted(starts, last, side="right") - 1])
        partly[query, start // block : query + 1] = True
        partly[query, : min(-(-prefix // block), query + 1)] = True
        if alone:
            wholly[query, -(-start // block) : query] = True
        wholly[query, : min(prefix // block, query)] = True
    return partly & ~wholly, wholly


def block_mask(lengths: Sequence[int], prefix: int, device: torch.device) -> BlockMask:
    """The mask of one row, the same for all heads."""
    partly, wholly = visible_blocks(lengths, prefix, BLOCK)
    numbers = np.concatenate([np.full(prefix, -1), np.repeat(np.arange(len(lengths)), lengths)])
    document_T = torch.from_numpy(numbers.astype(np.int32)).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (document_T[query] == document_T[key]) | (document_T[key] < 0)
        return inside & (query >= key)

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        counts = blocks.sum(axis=1).astype(np.int32)
        return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

    total = len(numbers)
    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(wholly), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(total, total)
    )


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@dataclass(frozen=True)
class FlexAttention:
    """Attention of one row's layers; `function` is the compiled flex_attention, or the eager one in a test."""

    mask: BlockMask
    function: Callable[..., Tensor]

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Causal attention within each document and to the prefix; B is 1. Returns (1, H, T, C)."""
        grouped = q_BHTC.shape[1] != k_BKTC.shape[1]
        return self.function(q_BHTC, k_BKTC, v_BKTC, block_mask=self.mask, enable_gqa=grouped)
