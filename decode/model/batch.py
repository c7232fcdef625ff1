"""Where the new positions of a pass lie in a member's cache: their places, their rotations, and who sees which keys."""

# R positions of all rows  B rows of a span  T positions of each  S cached positions  E key and value  H query heads
# K key/value heads  C head width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minillama import KVCache, LlamaConfig
from minillama.model import rope_frequencies

KEYS_MULTIPLE = 64
# Which positions, their rows' keys and values of every layer, and the mask.
Block = tuple[slice | Tensor, Sequence[tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Span:
    """Cache rows `first .. first + rows - 1`, each of which gets `count` new positions in this pass."""

    first: int
    rows: int
    count: int


class Pass:
    """Where the positions of one forward pass lie, for one member: its rows, its rotations, who sees which keys.

    spans: in the order of the flat positions.   starts: for each row of each span the number of positions it has.
    Raises ValueError when a row would run past the end of its cache.
    """

    def __init__(self, config: LlamaConfig, spans: Sequence[Span], starts: Sequence[int], cache: KVCache) -> None:
        slots: list[int] = []
        positions: list[int] = []
        keys: list[int] = []
        self.capacity = capacity = cache.capacity
        device = cache.entries_LBSEKC.device
        begin = iter(starts)
        for span in spans:
            last = 0
            for row in range(span.first, span.first + span.rows):
                start = next(begin)
                slots += range(row * capacity + start, row * capacity + start + span.count)
                positions += range(start, start + span.count)
                last = max(last, start + span.count)
            if last > capacity:
                raise ValueError(f"position {last - 1} runs past the end of a cache of {capacity} positions")
            keys.append(min(cache_positions(last), capacity))
        self.slot_R = torch.tensor(slots, device=device)
        self.position_R = torch.tensor(positions, device=device)
        self.turn_RHC = rotations_at(config, self.position_R)
        self._spans, self._keys, self._cache = spans, keys, cache

    @cached_property
    def blocks(self) -> list[Block]:
        """One for each product of queries with keys, where attention is PyTorch's."""
        spans, keys, cache = self._spans, self._keys, self._cache
        device = self.slot_R.device
        mask_R11S = mask_beyond(self.position_R, max(keys), cache.entries_LBSEKC.dtype)
        blocks: list[Block] = []

        def add(at: slice | Tensor, first: int, rows: int, seen: int, count: int = 1) -> None:
            entries = cache.entries_LBSEKC[:, first : first + rows, :seen].permute(0, 3, 1, 4, 2, 5)  # L E B K S C
            if count > 1:
                entries = entries.expand(-1, -1, count, -1, -1, -1)
            keys_LBKSC, values_LBKSC = entries.unbind(1)
            blocks.append((at, list(zip(keys_LBKSC.unbind(), values_LBKSC.unbind())), mask_R11S[at, ..., :seen]))

        # Prompts being read stand among rows that decode: the last new position of all rows is one product, and what
        # stands before it another for each prompt.
        ends = [span.first + span.rows for span in spans]
        last_together = len(spans) > 1 and ends[:-1] == [span.first for span in spans[1:]]
        start = 0
        final: list[int] = []
        for span, seen in zip(spans, keys):
            stop = start + span.rows * span.count
            final += range(start + span.count - 1, stop, span.count)
            count = span.count - last_together
            if span.rows < count:  # each row's positions together
                for row in range(span.rows):
                    first = start + row * span.count
                    add(slice(first, first + count), span.first + row, 1, seen, count)
            else:  # the t-th position of all rows of the span together
                for first in range(start, start + count):
                    add(slice(first, stop, span.count), span.first, span.rows, seen)
            start = stop
        if last_together:
            add(torch.tensor(final, device=device), spans[0].first, ends[-1] - spans[0].first, max(keys))
        return blocks


class RowsPlaces:
    """What passes over the first rows of a cache have in common: made once, and kept by whoever records graphs."""

    def __init__(self, config: LlamaConfig, cache: KVCache) -> None:
        device = cache.entries_LBSEKC.device
        self.config, self.cache = config, cache
        self.first_B = torch.arange(0, cache.batch_size * cache.capacity, cache.capacity, device=device)
        # On a GPU the rotations of all positions, since each operation of a step has its price.
        every_P = torch.arange(cache.capacity, device=device)
        self.turn_PC = turns_at(config, every_P) if device.type == "cuda" else None


class RowsPass(Pass):
    """One new position in each of the first B rows of a cache, at positions that only the device knows."""

    def __init__(self, places: RowsPlaces, position_B: Tensor, keys: int) -> None:
        self.position_B, self.capacity = position_B, places.cache.capacity
        self.slot_R = places.first_B[: len(position_B)] + position_B
        if places.turn_PC is None:
            self.turn_RHC = rotations_at(places.config, position_B)
        else:
            self.turn_RHC = places.turn_PC.index_select(0, position_B)[:, None]
        self._of_queries = places.cache.entries_LBSEKC, keys

    @cached_property
    def blocks(self) -> list[Block]:
        """One, for PyTorch's attention; a kernel that reads what each row has filled asks for none."""
        entries_LBSEKC, keys = self._of_queries
        rows = len(self.position_B)
        keys_LBKSC, values_LBKSC = entries_LBSEKC[:, :rows, :keys].permute(0, 3, 1, 4, 2, 5).unbind(1)
        of_layers = list(zip(keys_LBKSC.unbind(), values_LBKSC.unbind()))
        return [(slice(0, rows), of_layers, mask_beyond(self.position_B, keys, entries_LBSEKC.dtype))]


def rotations_at(config: LlamaConfig, position_R: Tensor) -> Tensor:
    """(R, H + K, C/2) complex: `turns_at` for every head of queries and keys. On a GPU (R, 1, C/2), and whoever turns
    with PyTorch's operations broadcasts.
    """
    turn_R1C = turns_at(config, position_R)[:, None]
    if position_R.is_cuda:
        return turn_R1C
    return turn_R1C.expand(-1, config.num_attention_heads + config.num_key_value_heads, -1).contiguous()


def turns_at(config: LlamaConfig, position_R: Tensor) -> Tensor:
    """(R, C/2) complex: what every pair of channels of queries and keys is turned by at each position."""
    angle_RC = position_R[:, None].float() * rope_frequencies(config, position_R.device)
    return torch.polar(torch.ones_like(angle_RC), angle_RC)


def mask_beyond(position_R: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """(R, 1, 1, S): what is added to the products of each position's queries with that many keys."""
    beyond_RS = torch.arange(keys, device=position_R.device) > position_R[:, None]
    mask_RS = torch.zeros(beyond_RS.shape, dtype=dtype, device=position_R.device)
    return mask_RS.masked_fill_(beyond_RS, float("-inf"))[:, None, None]


def cache_positions(count: int) -> int:
    """`count` rounded up to what attention reads at once."""
    return -(-count // KEYS_MULTIPLE) * KEYS_MULTIPLE
