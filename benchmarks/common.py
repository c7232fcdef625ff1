"""What several benchmarks share: timing of alternating rivals, the machine's own speed, result files by device name.

Rivals alternate within one run, so that other work on the machine disturbs all of them alike; only ratios within a run
mean something. A run records the share of processor time that the host of a virtual machine took away ("steal").
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minillama.machine import processor_name, versions

RESULTS = Path(__file__).parent / "results"


def header(*packages: str) -> dict[str, Any]:
    """What every result starts with: date, device, threads and the versions that decide the figures."""
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "triton", *packages) | cuda,
    }


def save(result: Mapping[str, Any], benchmark: str, folder: Path | None = None) -> Path:
    """Write one run to `<folder>/<device>-<date>.json`; the default folder is benchmarks/results/<benchmark>."""
    folder = folder or RESULTS / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^A-Za-z0-9]+", "-", result["device"]).strip("-").lower()
    path = folder / f"{device}-{result['date'][:19].replace(':', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def alternate(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each rival, median and least, over rounds in which every one runs once, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, function in rivals.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(round((time.perf_counter() - start) * 1e3, 4))
    return {name: {"median_ms": statistics.median(ms[1:]), "least_ms": min(ms[1:])} for name, ms in times.items()}


class StealClock:
    """The share of processor time that the host took away since the clock was made; 0 where the system has none."""

    def __init__(self) -> None:
        self.start = self._ticks()

    def share(self) -> float:
        worked, stolen = (now - then for now, then in zip(self._ticks(), self.start, strict=True))
        return round(stolen / max(worked + stolen, 1), 3)

    @staticmethod
    def _ticks() -> tuple[int, int]:
        """(worked, stolen) of all processors since the system started."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0, 0
        user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text(encoding="ascii").split()[1:9])
        return user + nice + system + interrupts + soft, stolen


def read_speed(rounds: int, megabytes: int = 512) -> float:
    """GB/s at which a CPU reads memory: the best of several sums over more than the caches hold."""
    data = torch.ones(megabytes << 18)
    times = alternate({"sum": lambda: data.sum()}, rounds)
    return round(data.numel() * 4 / times["sum"]["least_ms"] / 1e6, 2)


def copy_speed(rounds: int) -> float:
    """GB/s of large copies on the GPU, reads and writes together."""
    source = torch.zeros(512 << 20, device="cuda")
    target = torch.empty_like(source)
    times = alternate({"ten copies": lambda: [target.copy_(source) for _ in range(10)]}, rounds)
    return round(10 * 2 * source.nbytes / times["ten copies"]["median_ms"] / 1e6, 1)


def matmul_speed(dtype: torch.dtype, device: str, rounds: int, size: int) -> float:
    """GFLOP/s of a square matmul."""
    x_DD = torch.randn(size, size, device=device).to(dtype)
    times = alternate({"matmul": lambda: x_DD @ x_DD}, rounds)
    return round(2 * size**3 / times["matmul"]["least_ms"] / 1e6, 1)
