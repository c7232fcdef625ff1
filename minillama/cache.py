"""A static key/value cache: allocated once, one length per sequence, written in place.

New keys are written at each sequence's own positions, and a query sees the keys up to its own position. Entries beyond
a sequence's length are never read, so dropping tokens (a rejected draft, right padding) only changes `lengths_B`.
"""

# L layers  B sequences  T new positions  S capacity  E key and value  K key/value heads  C head width

import torch
from torch import Tensor

from minillama.config import LlamaConfig


class KVCache:
    """Keys and values of every layer for `batch_size` sequences of up to `capacity` positions.

    lengths_B (int64, on the cache's device) is the number of valid positions of each sequence. `filled`, a host
    integer, is an upper bound of all lengths: attention reads that many positions and no more.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # A position's keys and values are adjacent: one write stores both, for any set of sequences and positions.
        shape = (config.num_hidden_layers, batch_size, capacity, 2, config.num_key_value_heads, config.head_dim)
        self.entries_LBSEKC = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.batch_size, self.capacity, self.filled = batch_size, capacity, 0

    @staticmethod
    def bytes_per_position(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Bytes of one position of one sequence, all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def copy_row(self, source: int, target: int, used: int) -> None:
        """Make sequence `target` equal to sequence `source`, whose length is `used`."""
        self.entries_LBSEKC[:, target, :used] = self.entries_LBSEKC[:, source, :used]
        self.lengths_B[target] = self.lengths_B[source]

    def extend(self, count: int, positions_BT: Tensor | None) -> Tensor:
        """Return the positions (B, T) of `count` new tokens of each sequence, and set the new lengths.

        By default they follow each sequence's last position. They are read back to the host.
        Raises ValueError where a position is negative or past the capacity.
        """
        if positions_BT is None:
            positions_BT = self.lengths_B[:, None] + torch.arange(count, device=self.lengths_B.device)
        first, last = int(positions_BT.min()), int(positions_BT.max())
        if first < 0:
            raise ValueError("cache positions must not be negative")
        if last >= self.capacity:
            raise ValueError(f"position {last} runs past the end of a cache of {self.capacity} positions")
        self.filled = max(self.filled, last + 1)
        self.lengths_B.copy_(positions_BT[:, -1] + 1)
        return positions_BT

    def write(self, layer: int, keys_BKTC: Tensor, values_BKTC: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values at their positions; return the filled part (B, K, filled, C) of both."""
        entries_BSEKC = self.entries_LBSEKC[layer]
        first_B = torch.arange(self.batch_size, device=positions_BT.device) * self.capacity
        index_R = (first_B[:, None] + positions_BT).flatten()
        for number, new_BKTC in enumerate((keys_BKTC, values_BKTC)):
            entries_BSEKC.flatten(0, 1)[:, number].index_copy_(0, index_R, new_BKTC.transpose(1, 2).flatten(0, 1))
        filled_BKSEC = entries_BSEKC[:, : self.filled].permute(0, 3, 1, 2, 4)
        return filled_BKSEC[..., 0, :], filled_BKSEC[..., 1, :]
