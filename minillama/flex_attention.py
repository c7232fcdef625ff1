"""Packed attention on a GPU: `flex_attention` on the row as it is, with a block mask that the host builds from lengths.

PyTorch's `create_block_mask` evaluates all T x T pairs; here the visible blocks follow from the sequences' lengths.
Nothing is moved: the prefix that the sequences share is read in its position of the row.
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
    """Return the partly visible and the fully visible blocks, each (S, S) bool, queries by keys.

    A query sees itself and the earlier keys of its own sequence and of the prefix.
    """
    sequence_starts = np.cumsum([prefix, *lengths[:-1]])
    start_T = np.concatenate([np.zeros(prefix, dtype=int), np.repeat(sequence_starts, lengths)])
    key = np.arange(-(-len(start_T) // block))
    query = key[:, None]
    start = start_T[query * block]  # of the sequence of the block's first query
    one_sequence = start == start_T[np.minimum((query + 1) * block, len(start_T)) - 1]
    partial = (key <= query) & ((key >= start // block) | (key * block < prefix))
    full = (key < query) & ((one_sequence & (key * block >= start)) | ((key + 1) * block <= prefix))
    return partial & ~full, full


def block_mask(lengths: Sequence[int], prefix: int, device: torch.device) -> BlockMask:
    """The mask of one row, shared by all heads."""
    partial, full = visible_blocks(lengths, prefix, BLOCK)
    numbers = np.concatenate([np.full(prefix, -1), np.repeat(np.arange(len(lengths)), lengths)])
    sequence_T = torch.from_numpy(numbers.astype(np.int32)).to(device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (sequence_T[query] == sequence_T[key]) | (sequence_T[key] < 0)
        return same & (query >= key)

    def indices(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        counts = blocks.sum(axis=1).astype(np.int32)
        return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

    total = len(numbers)
    return BlockMask.from_kv_blocks(
        *indices(partial), *indices(full), BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(total, total)
    )


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@dataclass(frozen=True)
class FlexAttention:
    """Attention on one packed row; `function` is the compiled flex_attention, or the eager one in a test."""

    mask: BlockMask
    function: Callable[..., Tensor]

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Causal attention within each sequence and to the prefix; B is 1. Returns (1, H, T, C)."""
        grouped = q_BHTC.shape[1] != k_BKTC.shape[1]
        return self.function(q_BHTC, k_BKTC, v_BKTC, block_mask=self.mask, enable_gqa=grouped)
