"""What several benchmarks share: timing of alternating rivals, the machine's own speed, result files by device name.

Rivals run one after the other within each round of one run, so that what else the machine does meets all of them alike;
only ratios within a run mean something. On a virtual machine the host may take the processor away ("steal"); a run
records how much, and a round that lost much can be repeated.
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


def machine_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def header(*packages: str) -> dict[str, Any]:
    """What every result starts with: date, device, threads and the versions that decide the figures."""
    found = versions("torch", "triton", *packages)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": machine_name(),
        "threads": torch.get_num_threads(),
        "versions": found,
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
    for function in rivals.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_ms": round(statistics.median(values) * 1e3, 4), "least_ms": round(min(values) * 1e3, 4)}
        for name, values in seconds.items()
    }


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
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        except OSError:
            return 0, 0
        user, nice, system, _, _, interrupts, soft, stolen = map(int, line.split()[1:9])
        return user + nice + system + interrupts + soft, stolen


def read_speed(rounds: int, megabytes: int = 512) -> float:
    """GB/s at which a CPU reads memory: the best of several sums over more than the caches hold."""
    data = torch.ones(megabytes << 18)
    times = alternate({"sum": lambda: data.sum()}, rounds)
    return round(data.numel() * 4 / times["sum"]["least_ms"] / 1e6, 2)


def copy_speed(rounds: int) -> float:
    """GB/s of a large copy on the GPU, reads and writes together."""
    size = 4 << 30
    source = torch.zeros(size // 8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(rounds + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return round(size / statistics.median(milliseconds[2:]) / 1e6, 1)


def matmul_speed(dtype: torch.dtype, device: str, rounds: int, size: int) -> float:
    """GFLOP/s of a square matmul."""
    x_DD = torch.randn(size, size, device=device).to(dtype)

    def matmul() -> None:
        torch.mm(x_DD, x_DD)
        if device != "cpu":
            torch.cuda.synchronize()

    return round(2 * size**3 / alternate({"matmul": matmul}, rounds)["matmul"]["least_ms"] / 1e6, 1)
