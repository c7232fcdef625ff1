"""Benchmarks of the CPU paths: rivals take turns within one run, so what else the machine does meets all of them alike.

B rows  D inputs  O outputs  V vocabulary  N members
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from kernels import PackedLinear, fused_head

from kernels.cpu import fused_logits as fused_logits_cpu
from kernels.moved_bytes import plain_eager
from kernels.cpu.packed_linear import DTYPES, has_bfloat16_instructions, has_float16_product
from kernels.types import Request


def alternate(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each rival, median and least, over rounds in which every one runs once."""
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


def read_speed(rounds: int, megabytes: int = 512) -> float:
    """GB/s at which memory is read here: the best of several sums over more than the caches hold."""
    data = torch.ones(megabytes << 18)
    times = alternate({"sum": lambda: data.sum()}, rounds)
    return round(data.numel() * 4 / times["sum"]["least_ms"] / 1e6, 2)


def logits_rows(batches: list[int], vocabulary: int, rounds: int, gigabytes_per_second: float) -> list[dict]:
    """The CPU path against plain eager, three members, argmax with log-probability."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in batches:
            generator = torch.Generator().manual_seed(batch)
            logits = tuple(torch.randn(batch, vocabulary, generator=generator).to(dtype) for _ in range(3))
            weights = torch.tensor([1.0, 0.5, -0.5])
            rivals: dict[str, Callable[[], object]] = {
                "cpu path": partial(fused_logits_cpu.run, Request(logits, weights)),
                "eager": partial(plain_eager, logits, weights),
            }
            times = alternate(rivals, rounds)
            bytes_read = 3 * batch * vocabulary * dtype.itemsize
            speed = bytes_read / times["cpu path"]["least_ms"] / 1e6
            rows.append(
                {
                    "batch": batch,
                    "vocabulary": vocabulary,
                    "members": 3,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": times,
                    "times_eager": round(times["eager"]["median_ms"] / times["cpu path"]["median_ms"], 2),
                    "gigabytes_per_second": round(speed, 2),
                    "share_of_roof": round(speed / gigabytes_per_second, 3),
                }
            )
    return rows


def linear_rows(batches: list[int], inputs: int, outputs: int, rounds: int) -> list[dict]:
    """Packed linear layers against `F.linear` and `weight @ x.T`, each in float32 and bf16."""
    generator = torch.Generator().manual_seed(0)
    weight_OD = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    half_OD = weight_OD.bfloat16()
    dtypes = [dtype for dtype in DTYPES if dtype != "auto" and (dtype != "float16" or has_float16_product())]
    packed = {dtype: PackedLinear(weight_OD, dtype=dtype) for dtype in dtypes}
    rows = []
    for batch in batches:
        x_BD = torch.randn(batch, inputs, generator=generator)
        half_BD = x_BD.bfloat16()
        rivals: dict[str, Callable[[], object]] = {
            "F.linear float32": partial(F.linear, x_BD, weight_OD),
            "weight @ x.T float32": partial(torch.mm, weight_OD, x_BD.T),
            "F.linear bfloat16": partial(F.linear, half_BD, half_OD),
            "weight @ x.T bfloat16": partial(torch.mm, half_OD, half_BD.T),
        }
        for dtype, layer in packed.items():
            rivals[f"packed {dtype}"] = partial(layer, x_BD if dtype in ("float32", "float16") else half_BD)
        with torch.inference_mode():
            times = alternate(rivals, rounds)
        median = {name: values["median_ms"] for name, values in times.items()}
        better = min(median["F.linear float32"], median["weight @ x.T float32"])
        better_half = min(median["F.linear bfloat16"], median["weight @ x.T bfloat16"])
        best = min(median[f"packed {dtype}"] for dtype in packed)
        rows.append(
            {
                "batch": batch,
                "shape": [inputs, outputs],
                "ms": times,
                "float32_times_linear": round(median["F.linear float32"] / median["packed float32"], 2),
                "float32_times_better_rival": round(better / median["packed float32"], 2),
                "bfloat16_times_better_rival": round(better_half / median["packed bfloat16"], 2),
                "best_times_linear": round(median["F.linear float32"] / best, 2),
                "best_times_best_rival": round(min(better, better_half) / best, 2),
            }
        )
    return rows


def head_memory(rows: int, vocabulary: int, widths: list[int]) -> dict:
    """Peak memory over the weights while tokens are scored, in a process of its own."""
    arguments = json.dumps({"rows": rows, "vocabulary": vocabulary, "widths": widths})
    code = f"from kernels.bench_cpu import _score_once; _score_once({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _score_once(arguments: str) -> None:
    """Prints the growth of this process's peak while it scores."""
    shape = json.loads(arguments)
    torch.manual_seed(0)
    output = [torch.empty(shape["vocabulary"], width, dtype=torch.bfloat16).normal_() for width in shape["widths"]]
    hidden = [torch.randn(shape["rows"], width).div_(width**0.5).bfloat16() for width in shape["widths"]]
    given_R = torch.randint(0, shape["vocabulary"], (shape["rows"],))
    # the libraries' own buffers come with the first product and are no part of the question
    fused_head([h_RD[:2] for h_RD in hidden], [o_VD[:64] for o_VD in output], [1.0] * len(hidden))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    fused_head(hidden, output, [1.0] * len(hidden), given=given_R)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    unfused = len(hidden) * shape["rows"] * shape["vocabulary"] * 2 / 2**20
    shape |= {"peak_megabytes_over_weights": round(peak, 1), "seconds": round(seconds, 2)}
    print(json.dumps(shape | {"megabytes_of_all_logits_in_bfloat16": round(unfused, 1)}))


def run(everything: bool, quick: bool) -> dict:
    """All CPU measurements: `quick` in seconds, to see that they run; `everything` adds the large vocabulary and
    model.
    """
    rounds = 3 if quick else 15
    speed = read_speed(rounds, 64 if quick else 512)
    batches = [1, 4] if quick else [1, 2, 4, 8, 16, 32, 64]
    logits = logits_rows(batches, 5_000 if quick else 49_152, rounds, speed)
    if everything:
        logits += logits_rows(batches, 128_256, rounds, speed)
    linear = linear_rows(
        batches if quick else [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], 2048, 512 if quick else 16_384, rounds
    )
    if everything:
        linear += linear_rows([1, 4, 16, 64], 576, 1536, rounds)
    if quick:
        head = head_memory(50, 5_000, [64, 64, 64])
    else:
        head = head_memory(1000, 128_256, [3072, 2048, 2048] if everything else [1024, 1024, 1024])
    return {
        "read_gigabytes_per_second": speed,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": has_bfloat16_instructions(),
        "threads": torch.get_num_threads(),
        "fused_logits": logits,
        "packed_linear": linear,
        "fused_head": head,
    }
