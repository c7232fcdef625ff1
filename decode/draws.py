"""How to sample, as a caller says it: numbers and keys on the host. `kernels.Sampling` is what a kernel is given."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Draws:
    """How to sample: see `kernels.Sampling`. The same seed draws the same tokens for a sentence in any batch.

    keys: for each prompt the number below 2**31 that its draws hang on; None: its index.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    keys: Sequence[int] | None = None

    def key(self, index: int) -> int:
        return index if self.keys is None else self.keys[index]
