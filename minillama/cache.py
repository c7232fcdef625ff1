"""A static key/value cache: allocated once, one length per row, written in place.

Rows of different lengths share a batch without left-padding: a row's new keys go to that row's own positions, and
queries see keys up to their own position. What lies beyond a row's length is stale and never read, so dropping tokens
(a rejected draft, the right padding of a ragged prefill) is only a change of `lengths`.
"""

# L layers  B rows  T new positions  S capacity  E key and value  K key/value heads  C head width

import torch
from torch import Tensor

from minillama.config import LlamaConfig


class KVCache:
    """Keys and values of every layer for `batch_size` rows of up to `capacity` positions.

    lengths_B (int64, on the cache's device) is the number of valid positions of each row. `filled`, a host integer, is
    an upper bound of all lengths: attention reads that many positions and no more.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # A position's keys and values lie together: one write stores both, for any set of rows and positions.
        shape = (config.num_hidden_layers, batch_size, capacity, 2, config.num_key_value_heads, config.head_dim)
        self.entries_LBSEKC = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.filled = 0
        self._whole: KVCache | None = None

    @property
    def batch_size(self) -> int:
        return self.entries_LBSEKC.shape[1]

    @property
    def capacity(self) -> int:
        return self.entries_LBSEKC.shape[2]

    @property
    def nbytes(self) -> int:
        return self.entries_LBSEKC.nbytes

    @staticmethod
    def bytes_per_position(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Bytes that one position of one row costs, all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def rows(self, first: int, last: int, filled: int | None = None) -> "KVCache":
        """A view of rows [first, last): same storage, so what is appended to the view is in the whole cache.

        `filled`: the longest of these rows, where the caller knows it; attention then reads no further. What the whole
        cache appends later is not in the view's `filled`: take a new view then.
        """
        view = object.__new__(KVCache)
        view.entries_LBSEKC = self.entries_LBSEKC[:, first:last]
        view.lengths_B = self.lengths_B[first:last]
        view.filled = self.filled if filled is None else filled
        view._whole = self
        return view

    def copy_row(self, source: int, target: int, used: int) -> None:
        """Make row `target` equal to row `source`, whose length is `used`."""
        self.entries_LBSEKC[:, target, :used] = self.entries_LBSEKC[:, source, :used]
        self.lengths_B[target] = self.lengths_B[source]

    def place(self, count: int, positions_BT: Tensor | None) -> Tensor:
        """Positions (B, T) of `count` new tokens a row, by default right behind each row; sets the new lengths.

        Raises ValueError when a row would run past the end. Explicit positions are read back to the host.
        """
        if positions_BT is None:
            if self.filled + count > self.capacity:
                self.filled = int(self.lengths_B.max())
            last = self.filled + count - 1
            positions_BT = self.lengths_B[:, None] + torch.arange(count, device=self.lengths_B.device)
        else:
            last = int(positions_BT.max())
            if int(positions_BT.min()) < 0:
                raise ValueError("cache positions must not be negative")
        if last >= self.capacity:
            raise ValueError(f"position {last} runs past the end of a cache of {self.capacity} positions")
        self.filled = max(self.filled, last + 1)
        whole = self._whole
        while whole is not None:  # rows appended through a view are rows of the whole cache too
            whole.filled, whole = max(whole.filled, self.filled), whole._whole
        self.lengths_B.copy_(positions_BT[:, -1] + 1)
        return positions_BT

    def write(self, layer: int, keys_BKTC: Tensor, values_BKTC: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values at their positions; returns the filled part (B, K, filled, C) of both."""
        entries_BSEKC = self.entries_LBSEKC[layer]
        first_B = torch.arange(self.batch_size, device=positions_BT.device) * self.capacity
        slots_R = (first_B[:, None] + positions_BT).flatten()
        for part, new_BKTC in enumerate((keys_BKTC, values_BKTC)):
            entries_BSEKC.flatten(0, 1)[:, part].index_copy_(0, slots_R, new_BKTC.transpose(1, 2).flatten(0, 1))
        filled_BKSEC = entries_BSEKC[:, : self.filled].permute(0, 3, 1, 2, 4)
        return filled_BKSEC[..., 0, :], filled_BKSEC[..., 1, :]

    def truncate(self, lengths_B: Tensor) -> None:
        """Forget every row's positions from `lengths_B` on; raises ValueError if a row is shorter than that."""
        if bool(((lengths_B > self.lengths_B) | (lengths_B < 0)).any()):
            raise ValueError("a cache can only be truncated to lengths that it has")
        self.lengths_B.copy_(lengths_B)
