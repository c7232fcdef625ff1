"""Where each member stands: its device and how its weights are held there, from `--device` and `--dtype`."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.packed_linear import INT8_ROWS, has_bfloat16_instructions
from minillama import InputError
from minillama.device import pick_device

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Place:
    """storage: one of DTYPES but auto, how the weights of linear layers are held."""

    device: torch.device
    storage: str

    @property
    def dtype(self) -> torch.dtype:
        """In which files are read, and in which what is not a linear layer stays."""
        return torch.bfloat16 if self.storage == "int8" else getattr(torch, self.storage)

    @property
    def packed(self) -> str:
        """The storage as PreparedLlama knows it: a CPU multiplies float16 weights in float32."""
        return "float32" if self.storage == "float16" else self.storage

    @property
    def weight_bytes(self) -> int:
        return BYTES[self.packed if self.device.type == "cpu" else self.storage]

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.dtype


def places(device: str, dtype: str | None, names: Sequence[str], rows: int = 1) -> dict[str, Place]:
    """`cuda:1` for all members, or `L=cuda:0,S=cpu` by name; members that are not named take the value without a name.

    auto: the first GPU, else the CPU; under torchrun the GPU of this process's LOCAL_RANK. dtype None: float32 on a
    CPU, bfloat16 on a GPU; auto: the fastest for that many rows. Raises InputError for unknown names and devices.
    """
    given = per_member(device.split(","), names, "--device", separator=",")
    found = {}
    for name in names:
        where = _pick(given[name] or "auto")
        on_cpu = where.type == "cpu"
        storage = dtype or ("float32" if on_cpu else "bfloat16")
        if storage == "auto":
            storage = fastest_storage(rows) if on_cpu else "bfloat16"
        if storage == "int8" and not on_cpu:
            raise InputError(f"--dtype int8: only on a CPU, and {name} is on {where}; use bfloat16")
        found[name] = Place(where, storage)
    return found


def fastest_storage(rows: int) -> str:
    """What this processor decodes fastest with (ratios of all three: docs/decoding.md)."""
    if has_bfloat16_instructions():
        return "bfloat16"
    return "int8" if rows <= INT8_ROWS // 2 else "float32"


def per_member(
    values: Iterable[str], names: Sequence[str], option: str, separator: str | None = None
) -> dict[str, str | None]:
    """`NAME=VALUE` for one member, `VALUE` for all that are not named; None where nothing is said."""
    found: dict[str, str] = {}
    general = None
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            if separator and general is not None:
                raise InputError(f"{option} {separator.join(values)}: two values without a name; use NAME=VALUE")
            general = text
        elif name not in names:
            raise InputError(f"{option} {text}: {name} is no model; the models are {', '.join(names)}")
        else:
            found[name] = value
    return {name: found.get(name, general) for name in names}


def local_rank() -> int:
    """Which of the processes that torchrun started on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _pick(name: str) -> torch.device:
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return pick_device(f"cuda:{local_rank() % torch.cuda.device_count()}")
    return pick_device(name)


def listed(names: Mapping[str, str]) -> str:
    """One value where all members have it, else `L value, S value`; GPUs' processes may share a name."""
    kinds = set(names.values())
    return re.sub(r"\s+", " ", kinds.pop() if len(kinds) == 1 else ", ".join(f"{n} {v}" for n, v in names.items()))
