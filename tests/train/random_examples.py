"""Random token sequences of unequal lengths, for runs that need no text."""

import torch
from tiny import TINY

from train.packing import Example


def examples_of(count: int, seed: int = 0) -> list[Example]:
    """Examples of 4 to 19 tokens, of which the last few are targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 20, (), generator=generator))
        tokens = torch.randint(2, TINY.vocab_size, (length,), generator=generator).tolist()
        rows.append(Example(tokens, int(torch.randint(1, length - 1, (), generator=generator))))
    return rows
