"""Where the new positions of a forward pass lie in a member's KV cache, their RoPE rotations, the keys they see."""

# R positions of all sequences  B slots  T positions of each  S cached positions  L layers  E key and value
# H query heads  K key/value heads  C head width  P all positions of a cache

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minillama import KVCache, LlamaConfig
from minillama.model import rope_frequencies

KEYS_MULTIPLE = 64
# Which positions, the keys and values of their slots in every layer, and the mask.
Block = tuple[slice | Tensor, Sequence[tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Segment:
    """Slots `first .. first + slots - 1` of a cache, each of which gets `count` new positions in this forward pass."""

    first: int
    slots: int
    count: int


class ForwardBatch:
    """The positions of one forward pass of one member: where they are stored, their rotations, which keys they see.

    segments: in the order of the flat positions.   starts: for each slot of each segment the positions it holds.
    Raises ValueError where a slot would run past its end.
    """

    def __init__(self, config: LlamaConfig, segments: Sequence[Segment], starts: Sequence[int], cache: KVCache) -> None:
        slots: list[int] = []
        positions: list[int] = []
        keys: list[int] = []
        self.capacity = capacity = cache.capacity
        device = cache.entries_LBSEKC.device
        next_start = iter(starts)
        for segment in segments:
            last = 0
            for slot in range(segment.first, segment.first + segment.slots):
                start = next(next_start)
                slots += range(slot * capacity + start, slot * capacity + start + segment.count)
                positions += range(start, start + segment.count)
                last = max(last, start + segment.count)
            if last > capacity:
                raise ValueError(f"position {last - 1} runs past the end of a cache of {capacity} positions")
            keys.append(min(cache_positions(last), capacity))
        self.slot_R = torch.tensor(slots, device=device)
        self.position_R = torch.tensor(positions, device=device)
        self.rope_RHC = rope_for_heads(config, self.position_R)
        self._segments, self._keys, self._cache = segments, keys, cache

    @cached_property
    def blocks(self) -> list[Block]:
        """One for each call of PyTorch's attention."""
        segments, keys, cache = self._segments, self._keys, self._cache
        device = self.slot_R.device
        mask_R11S = causal_mask(self.position_R, max(keys), cache.entries_LBSEKC.dtype)
        blocks: list[Block] = []

        def add(at: slice | Tensor, first: int, slots: int, seen: int, count: int = 1) -> None:
            entries = cache.entries_LBSEKC[:, first : first + slots, :seen].permute(0, 3, 1, 4, 2, 5)  # L E B K S C
            if count > 1:
                entries = entries.expand(-1, -1, count, -1, -1, -1)
            keys_LBKSC, values_LBKSC = entries.unbind(1)
            blocks.append((at, list(zip(keys_LBKSC.unbind(), values_LBKSC.unbind())), mask_R11S[at, ..., :seen]))

        # Prompts that are being read stand among slots that decode: the last new position of all slots is one call, and
        # the positions before it another for each prompt.
        ends = [segment.first + segment.slots for segment in segments]
        last_together = len(segments) > 1 and ends[:-1] == [segment.first for segment in segments[1:]]
        start = 0
        final: list[int] = []
        for segment, seen in zip(segments, keys):
            stop = start + segment.slots * segment.count
            final += range(start + segment.count - 1, stop, segment.count)
            count = segment.count - last_together
            if segment.slots < count:  # the positions of each slot together
                for slot in range(segment.slots):
                    first = start + slot * segment.count
                    add(slice(first, first + count), segment.first + slot, 1, seen, count)
            else:  # the t-th position of all slots of the segment together
                for first in range(start, start + count):
                    add(slice(first, stop, segment.count), segment.first, segment.slots, seen)
            start = stop
        if last_together:
            add(torch.tensor(final, device=device), segments[0].first, ends[-1] - segments[0].first, max(keys))
        return blocks


class DecodeTables:
    """What all forward passes of one new position a slot share: made once, and kept by the owner of the graphs."""

    def __init__(self, config: LlamaConfig, cache: KVCache) -> None:
        device = cache.entries_LBSEKC.device
        self.config, self.cache = config, cache
        self.first_B = torch.arange(0, cache.batch_size * cache.capacity, cache.capacity, device=device)
        # On a GPU the rotations of all positions, since each operation of a step costs a launch.
        every_P = torch.arange(cache.capacity, device=device)
        self.rope_PC = rope_at(config, every_P) if device.type == "cuda" else None


class DecodeBatch(ForwardBatch):
    """One new position in each of the first B slots of a cache, at positions that only the device knows."""

    def __init__(self, tables: DecodeTables, position_B: Tensor, keys: int) -> None:
        self.position_B, self.capacity = position_B, tables.cache.capacity
        self.slot_R = tables.first_B[: len(position_B)] + position_B
        if tables.rope_PC is None:
            self.rope_RHC = rope_for_heads(tables.config, position_B)
        else:
            self.rope_RHC = tables.rope_PC.index_select(0, position_B)[:, None]
        self._entries_keys = tables.cache.entries_LBSEKC, keys

    @cached_property
    def blocks(self) -> list[Block]:
        """One, for PyTorch's attention; our own kernel does not use it."""
        entries_LBSEKC, keys = self._entries_keys
        slots = len(self.position_B)
        keys_LBKSC, values_LBKSC = entries_LBSEKC[:, :slots, :keys].permute(0, 3, 1, 4, 2, 5).unbind(1)
        layers = list(zip(keys_LBKSC.unbind(), values_LBKSC.unbind()))
        return [(slice(0, slots), layers, causal_mask(self.position_B, keys, entries_LBSEKC.dtype))]


def rope_for_heads(config: LlamaConfig, position_R: Tensor) -> Tensor:
    """(R, H + K, C/2) complex: `rope_at` for each head of queries and keys; on CUDA (R, 1, C/2), to be broadcast."""
    rope_R1C = rope_at(config, position_R)[:, None]
    if position_R.is_cuda:
        return rope_R1C
    return rope_R1C.expand(-1, config.num_attention_heads + config.num_key_value_heads, -1).contiguous()


def rope_at(config: LlamaConfig, position_R: Tensor) -> Tensor:
    """(R, C/2) complex: the rotation of every pair of channels of queries and keys at each position."""
    angle_RC = position_R[:, None].float() * rope_frequencies(config, position_R.device)
    return torch.polar(torch.ones_like(angle_RC), angle_RC)


def causal_mask(position_R: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """(R, 1, 1, S): added to the scores of each position's queries with that many keys."""
    beyond_RS = torch.arange(keys, device=position_R.device) > position_R[:, None]
    mask_RS = torch.zeros(beyond_RS.shape, dtype=dtype, device=position_R.device)
    return mask_RS.masked_fill_(beyond_RS, float("-inf"))[:, None, None]


def cache_positions(count: int) -> int:
    """`count` rounded up to a multiple of what attention reads at once."""
    return -(-count // KEYS_MULTIPLE) * KEYS_MULTIPLE
