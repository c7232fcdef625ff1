"""The device map of a run: each member's device, weight dtype and number of tensor-parallel processes, from `--device`,
`--dtype` and `--tensor-parallel`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.cpu.packed_linear import INT8_ROWS, has_bfloat16_instructions, has_float16_product
from minillama.errors import InputError
from minillama.machine import pick_device

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# The largest batches at which int8 weights are faster than float16, and float16 faster than float32. A layer of 16,384
# x 2,048 on two cores with AVX-512, without bf16 instructions: int8 2.9, 3.5, 5.7 ms at 1, 2, 4 rows, float16 3.9, 3.9,
# 4.2; float16 9.0, 14.6 at 16, 32 rows, float32 10.3, 12.9. `python -m benchmarks.kernels` measures that layer.
INT8_BATCH_SIZE, FLOAT16_BATCH_SIZE = 2, 16


@dataclass(frozen=True)
class Placement:
    """weight_dtype: of the linear layers, one of config.DTYPES but auto.   tp_size: processes that share the member."""

    device: torch.device
    weight_dtype: str
    tp_size: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are read in, and that all but the linear layers keep."""
        return torch.bfloat16 if self.weight_dtype == "int8" else getattr(torch, self.weight_dtype)

    @property
    def packed_dtype(self) -> str:
        """The weight dtype for PackedLlama: float32 instead of float16 on a CPU that cannot multiply float16."""
        return "float32" if self.weight_dtype == "float16" and not has_float16_product() else self.weight_dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes per weight."""
        return BYTES[self.packed_dtype if self.device.type == "cpu" else self.weight_dtype]

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.dtype


def placements(
    device: str, dtype: str | None, names: Sequence[str], batch_size: int = 1, tensor_parallel: str = "1"
) -> dict[str, Placement]:
    """By name from `cuda:1` for all members, or `L=cuda:0,S=cpu`; a member without a name gets the general value.

    auto: the first GPU, else the CPU; under torchrun the GPU of this process's LOCAL_RANK. dtype None: float32 on a
    CPU, bfloat16 on a GPU; auto: the fastest for this batch size. tensor_parallel: the number of processes that share
    each member; 1 for those without one in `L=2`. Raises InputError for unknown names and devices, for a device with a
    number where several processes share a member, and for two different sizes: a run's groups have one.
    """
    devices = per_member(device.split(","), names, "--device", "auto")
    sizes = per_member(tensor_parallel.split(","), names, "--tensor-parallel", "1")
    found = {}
    for name in names:
        where = _pick(devices[name])
        on_cpu = where.type == "cpu"
        weight_dtype = dtype or ("float32" if on_cpu else "bfloat16")
        if weight_dtype == "auto":
            weight_dtype = fastest_weight_dtype(batch_size) if on_cpu else "bfloat16"
        if weight_dtype == "int8" and not on_cpu:
            raise InputError(f"--dtype int8: only on a CPU, and {name} is on {where}; use bfloat16")
        size = sizes[name]
        if not re.fullmatch(r"[1-9]\d*", size):
            raise InputError(f"--tensor-parallel {tensor_parallel}: {size or 'nothing'} is no number of processes")
        if size != "1" and re.fullmatch(r"cuda:\d+", devices[name]):
            raise InputError(
                f"--device {device}: {size} processes share {name}, each with a GPU of its own; use auto or cuda"
            )
        found[name] = Placement(where, weight_dtype, int(size))
    if len({*sizes.values(), "1"}) > 2:
        raise InputError(f"--tensor-parallel {tensor_parallel}: a run's groups have one size; give one number")
    return found


def fastest_weight_dtype(batch_size: int) -> str:
    """The weight dtype with which this processor decodes fastest."""
    if has_bfloat16_instructions():
        return "bfloat16"
    if not has_float16_product():
        return "int8" if batch_size <= INT8_ROWS // 2 else "float32"
    return "int8" if batch_size <= INT8_BATCH_SIZE else "float16" if batch_size <= FLOAT16_BATCH_SIZE else "float32"


def per_member(values: Iterable[str], names: Sequence[str], option: str, default: str = "") -> dict[str, str]:
    """`NAME=VALUE` for one member, `VALUE` for all others, which get the default where there is none."""
    by_name: dict[str, str] = {}
    general = None
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            if general is not None:
                raise InputError(f"{option} {general}, {text}: two values without a name; use NAME=VALUE")
            general = text
        elif name not in names:
            raise InputError(f"{option} {text}: {name} is no model; the models are {', '.join(names)}")
        else:
            by_name[name] = value
    return {name: by_name.get(name, default if general is None else general) for name in names}


def listed(values: Mapping[str, str]) -> str:
    """One value where all members have the same, else `L value, S value`."""
    different = set(values.values())
    text = different.pop() if len(different) == 1 else ", ".join(f"{name} {value}" for name, value in values.items())
    return " ".join(text.split())


def _pick(name: str) -> torch.device:
    if name in ("auto", "cuda") and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return pick_device(f"cuda:{local_rank % torch.cuda.device_count()}")
    return pick_device(name)
