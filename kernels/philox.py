"""Random numbers without state: Philox 4x32-10 in PyTorch, the definition that the Triton kernel follows to the bit.

Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): ten rounds of two 32-bit
products over a counter of four words under a key of two. Here the key is the seed and the counter is (v // 4, position,
row id, 0), whose four outputs belong to entries v // 4 * 4 + 0..3: they do not depend on the batch.

    B rows  V vocabulary  C counters, V / 4 rounded up
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64 tensors, for each counter; words of counters and keys broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # an int64 product of two words may wrap, its low and high words are right all the same once masked
        product0, product1 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(seed_B: Tensor, row_id_B: Tensor, position_B: Tensor, start: int, stop: int) -> Tensor:
    """One 32-bit word for each entry start .. stop of each row, (B, stop - start) int64; `start` is a multiple of 4."""
    seeds, rows, positions = seed_B[:, None], row_id_B[:, None] & _WORD, position_B[:, None] & _WORD
    counter_C = torch.arange(start // 4, -(-stop // 4), dtype=torch.int64, device=row_id_B.device)
    words = philox((counter_C[None], positions, rows, torch.zeros_like(rows)), (seeds & _WORD, seeds >> 32 & _WORD))
    return torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)[:, : stop - start]


def gumbel(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise -log(E), E exponential, from 32-bit words.

    With u = (word + 1/2) / 2**32, E = -log(1 - u): fine steps where u is small and the noise large. In float32 the
    logarithm of 1 - u loses them below u = 2**-12; three terms of its series replace it there.
    """
    u = (words.to(dtype) + 0.5) * 2.0**-32
    if dtype == torch.float64:
        return -torch.log(-torch.log1p(-u))
    u = u.clamp_max(1 - 2.0**-24)
    exponential = torch.where(u < 2.0**-12, u * (1 + u * (0.5 + u * (1 / 3))), -torch.log(1 - u))
    return -torch.log(exponential)
