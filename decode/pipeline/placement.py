"""Where each member stands: its device, how its weights are held there and over how many processes, from `--device`,
`--dtype` and `--tensor-parallel`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.cpu.packed_linear import INT8_ROWS, has_bfloat16_instructions, has_float16_product
from minillama import InputError
from minillama.machine import pick_device

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# Up to so many rows int8 weights are faster than float16's, and those faster than float32's. A layer of 16,384 x 2,048
# on two cores with AVX-512, without bf16 instructions: int8 2.9, 3.5, 5.7 ms at 1, 2, 4 rows, float16 3.9, 3.9, 4.2;
# float16 9.0, 14.6 at 16, 32 rows, float32 10.3, 12.9. `python -m benchmarks.kernels` measures that layer.
INT8_BEFORE_FLOAT16, FLOAT16_ROWS = 2, 16


@dataclass(frozen=True)
class Place:
    """storage: one of DTYPES but auto, how the weights of linear layers are held.   parts: processes that share it."""

    device: torch.device
    storage: str
    parts: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """In which files are read, and in which what is not a linear layer stays."""
        return torch.bfloat16 if self.storage == "int8" else getattr(torch, self.storage)

    @property
    def packed(self) -> str:
        """The storage as PreparedLlama knows it: a CPU that has no product of float16 weights takes float32 ones."""
        return "float32" if self.storage == "float16" and not has_float16_product() else self.storage

    @property
    def weight_bytes(self) -> int:
        return BYTES[self.packed if self.device.type == "cpu" else self.storage]

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.dtype


def places(
    device: str, dtype: str | None, names: Sequence[str], rows: int = 1, split: Mapping[str, int] | None = None
) -> dict[str, Place]:
    """`cuda:1` for all members, or `L=cuda:0,S=cpu` by name; members that are not named take the value without a name.

    auto: the first GPU, else the CPU; under torchrun the GPU of this process's LOCAL_RANK. dtype None: float32 on a
    CPU, bfloat16 on a GPU; auto: the fastest for that many rows. split: what `splits` found. Raises InputError for
    unknown names and devices, and for a device by its number where several processes share a member.
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
        parts = split[name] if split else 1
        if parts > 1 and re.fullmatch(r"cuda:\d+", given[name] or ""):
            raise InputError(
                f"--device {device}: {parts} processes share {name}, each with a GPU of its own; use auto or cuda"
            )
        found[name] = Place(where, storage, parts)
    return found


def splits(text: str, names: Sequence[str]) -> dict[str, int]:
    """`--tensor-parallel 2` for all members, `L=2` for one: how many processes share each; 1 where nothing is said.

    Raises InputError for what is no number of processes, and for two different ones: a run's groups have one size.
    """
    found = {}
    for name, given in per_member(text.split(","), names, "--tensor-parallel", separator=",").items():
        if given is not None and not re.fullmatch(r"[1-9]\d*", given):
            raise InputError(f"--tensor-parallel {text}: {given or 'nothing'} is no number of processes")
        found[name] = int(given or 1)
    if len(sizes := {size for size in found.values() if size > 1}) > 1:
        raise InputError(f"--tensor-parallel {text}: a run's groups have one size; give one number, not {len(sizes)}")
    return found


def fastest_storage(rows: int) -> str:
    """What this processor decodes fastest with."""
    if has_bfloat16_instructions():
        return "bfloat16"
    if not has_float16_product():
        return "int8" if rows <= INT8_ROWS // 2 else "float32"
    return "int8" if rows <= INT8_BEFORE_FLOAT16 else "float16" if rows <= FLOAT16_ROWS else "float32"


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
