"""The machine a command runs on: its devices, free memory, processor and package versions, for checks and reports."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> "torch.device":
    """`--device` of every command: auto (cuda where there is one), cpu, cuda or cuda:N. Raises InputError."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise InputError(f"--device {name}: unknown; use cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError(f"--device {name}: no CUDA device here; use --device cpu")
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return device


def device_name(device: "torch.device") -> str:
    """A device as reports name it: `cuda:0 (NVIDIA H100)`, or `cpu (AVX512, 8 threads)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''})"


def processor_name() -> str:
    """The processor's name on Linux; its architecture where the system gives no name."""
    return _read_fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine()


def free_memory(swap: bool = False) -> int | None:
    """Bytes of main memory that a program can still allocate; None where that is not known (macOS).

    swap: add the free swap space. A container's limit is not counted.
    """
    fields = _read_fields("/proc/meminfo")
    names = ("MemAvailable", "SwapFree") if swap else ("MemAvailable",)
    if any(name not in fields for name in names):
        return None
    return sum(int(fields[name].split()[0]) << 10 for name in names)


def versions(*packages: str) -> dict[str, str]:
    """The version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read_fields(path: str) -> dict[str, str]:
    """The `name : value` lines of a file in /proc, the last of a name; empty where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
