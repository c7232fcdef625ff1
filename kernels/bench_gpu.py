"""Benchmarks on a GPU: Triton against eager PyTorch, torch.compile and a plain device copy of the same bytes, with a
cold L2.

Every rival is a CUDA graph of many launches, each over another set of inputs, together several times the L2: the
host's time is not in the figures, and no launch finds its inputs in the cache. A figure is the time of a replay by CUDA
events over the number of launches, the median of rounds in which the rivals take turns.

    B rows  V vocabulary  N members  D width
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import FusedLogits, fused_head, fused_logits
from kernels.moved_bytes import plain_eager

VOCABULARY = 128_256
# Bytes that the sets of inputs of one rival take together, several times the L2 of an H200 (60 MB), and their number.
ROTATED_BYTES, MOST_SETS, LEAST_SETS = 256 << 20, 1024, 4


def alternate(rivals: Mapping[str, Callable[[int], object]], sets: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one call of each rival, which takes the number of a set of inputs."""
    graphs = {name: _recorded(function, sets) for name, function in rivals.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rivals}
    for number in range(rounds + 2):
        for name, (graph, _) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            if number >= 2:  # the first replays bring the graph to the device
                events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: round(statistics.median(start.elapsed_time(stop) for start, stop in pairs) * 1e3 / sets, 2)
        for name, pairs in events.items()
    }


def each(function: Callable[..., object], sets: Sequence[Any], *rest: Any, **options: Any) -> Callable[[int], object]:
    """A rival: the function of the numbered set of inputs."""
    return lambda number: function(sets[number], *rest, **options)


def _recorded(function: Callable[[int], object], sets: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of one call for each set, and the results, which the graph writes again at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(number) for number in range(sets)]
    return graph, kept


def sets_of(size: int) -> int:
    """How many sets of inputs of so many bytes make a launch's own ones cold."""
    return max(LEAST_SETS, min(MOST_SETS, -(-ROTATED_BYTES // size)))


def copies_of(size: int, sets: int) -> Callable[[int], object]:
    """A device copy that reads and writes `size` bytes together, by a kernel: a graph's own copies are slower."""
    source = torch.zeros(sets, max(1, size // 8), device="cuda")
    target = torch.empty_like(source)
    return lambda number: torch.mul(source[number], 1.0, out=target[number])


def copy_speed(rounds: int) -> float:
    """GB/s of a large device copy, reads and writes together: the roof."""
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


def logits_rows(batches: list[int], member_counts: list[int], dtypes: list[torch.dtype], rounds: int) -> list[dict]:
    """The fused kernel over B x N x dtype; torch.compile, which takes seconds for each shape, for three of bf16."""
    roof = copy_speed(rounds)
    rows = []
    for dtype in dtypes:
        for members in member_counts:
            compiled = torch.compile(plain_eager, dynamic=False)
            for batch in batches:
                size = members * batch * VOCABULARY * dtype.itemsize
                sets = sets_of(size)
                logits = [
                    [torch.randn(batch, VOCABULARY, device="cuda", dtype=dtype) for _ in range(members)]
                    for _ in range(sets)
                ]
                weights = torch.linspace(1.0, 0.5, members, device="cuda")
                out = fused_logits(logits[0], weights)
                rivals = {
                    "triton": each(fused_logits, logits, weights, out=out),
                    "eager": each(plain_eager, logits, weights),
                    "copy": copies_of(size, sets),
                }
                if (members, dtype) == (3, torch.bfloat16):
                    rivals["compiled"] = each(compiled, logits, weights)
                times = alternate(rivals, sets, rounds)
                speed = size / times["triton"] / 1e3
                row = {
                    "batch": batch,
                    "vocabulary": VOCABULARY,
                    "members": members,
                    "dtype": str(dtype).removeprefix("torch."),
                    "microseconds": times,
                    "gigabytes_per_second": round(speed, 1),
                    "roof_gigabytes_per_second": roof,
                    "share_of_roof": round(speed / roof, 3),
                    "share_of_copy_of_same_bytes": round(times["copy"] / times["triton"], 3),
                    "times_eager": round(times["eager"] / times["triton"], 2),
                }
                if "compiled" in times:
                    row["times_compiled"] = round(times["compiled"] / times["triton"], 2)
                rows.append(row)
    return rows


def feature_rows(batch: int, rounds: int) -> list[dict]:
    """What each result on request adds to the time of argmax with log-probability, three members of bf16."""
    sets = sets_of(3 * batch * VOCABULARY * 2)
    logits = [
        [torch.randn(batch, VOCABULARY, device="cuda", dtype=torch.bfloat16) for _ in range(3)] for _ in range(sets)
    ]
    weights = torch.ones(3, device="cuda")
    asked: dict[str, dict] = {"argmax": {}, "members": {"members": True}, "entropy": {"entropy": True}}
    asked |= {"top_k=4": {"top_k": 4}, "top_k=16": {"top_k": 16}}

    rivals = {
        name: each(fused_logits, logits, weights, out=fused_logits(logits[0], weights, **options), **options)
        for name, options in asked.items()
    }
    times = alternate(rivals, sets, rounds)
    return [{"batch": batch, "result": name, "microseconds": time} for name, time in times.items()]


def head_rows(batches: list[int], rounds: int) -> list[dict]:
    """The fused output layers against cuBLAS products followed by the fused kernel."""
    widths = (3072, 2048, 2048)
    output = [torch.randn(VOCABULARY, width, device="cuda", dtype=torch.bfloat16) for width in widths]
    weights = torch.tensor([1.0, 0.5, 0.5], device="cuda")
    rows = []
    for batch in batches:
        hidden = [torch.randn(batch, width, device="cuda", dtype=torch.bfloat16) for width in widths]
        out = fused_head(hidden, output, weights)
        logits_out = fused_logits([h_BD @ o_VD.T for h_BD, o_VD in zip(hidden, output, strict=True)], weights)

        def unfused(hidden: list[Tensor], out: FusedLogits) -> FusedLogits:
            logits = [h_BD @ o_VD.T for h_BD, o_VD in zip(hidden, output, strict=True)]
            return fused_logits(logits, weights, out=out)

        same = [hidden] * LEAST_SETS
        rivals = {
            "fused_head": each(fused_head, same, output, weights, out=out),
            "cuBLAS + kernel": each(unfused, same, logits_out),
        }
        times = alternate(rivals, LEAST_SETS, rounds)  # the weights alone are far larger than the L2
        ratio = times["cuBLAS + kernel"] / times["fused_head"]
        rows.append({"batch": batch, "microseconds": times, "times_unfused": round(ratio, 2)})
    return rows


def run(everything: bool, quick: bool) -> dict:
    """All GPU measurements; `everything` adds fp16, float32, other N and larger batches."""
    rounds = 5 if quick else 50
    batches = [1, 8, 32, 64, 256] if not everything else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    members = [3] if not everything else [1, 2, 3, 5, 8]
    dtypes = [torch.bfloat16] if not everything else [torch.bfloat16, torch.float16, torch.float32]
    return {
        "fused_logits": logits_rows(batches, members, dtypes, rounds),
        "results_on_request": [row for batch in (8, 64) for row in feature_rows(batch, rounds)],
        "fused_head": head_rows([1, 16, 64, 256] if everything else [16, 64], rounds),
    }
