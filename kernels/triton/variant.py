"""What a kernel file tells `python -m kernels.resources` about itself: `variants()` yields these."""

from dataclasses import dataclass
from typing import Any

import torch

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with the arguments of a launch; `aligned` says whether rows start at multiples of 16 bytes."""

    kernel: str
    name: str
    function: Any
    positional: tuple
    switches: dict
    options: dict
    aligned: bool = True
