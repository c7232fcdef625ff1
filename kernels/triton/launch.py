"""The one way to launch a kernel, and to record launches on a machine without a GPU. Does not import Triton."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Launch:
    """A kernel with its positional arguments, constexpr switches and compiler options."""

    function: Any
    positional: tuple
    switches: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A named launch, from a kernel file's `variants()`; aligned: rows start at multiples of 16 bytes."""

    kernel: str
    name: str
    launch: Launch
    aligned: bool = True


_recordings: list[list[Launch]] = []


def launch(function: Any, grid: tuple[int, ...], positional: tuple, switches: dict, options: dict) -> None:
    """Launch a kernel, or only record it inside `recording`."""
    if _recordings:
        _recordings[-1].append(Launch(function, positional, switches, options))
    else:
        device = next(value.device for value in positional if isinstance(value, torch.Tensor))
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            function[grid](*positional, **switches, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are put into this list and not run: tensors may be on any device."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()
