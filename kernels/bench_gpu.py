"""Benchmarks on a GPU: Triton against eager PyTorch, torch.compile and a plain device copy of the same bytes, with a
cold L2.

Every measurement is a median of CUDA-event times; before each a buffer larger than the L2 is overwritten, and rivals
take turns. The launches queue up behind that overwriting, so the host's own time is not in the figures.

    B rows  V vocabulary  N members  D width
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from kernels import fused_head, fused_logits
from kernels.moved_bytes import plain_eager

FLUSH_BYTES = 512 << 20
VOCABULARY = 128_256


def alternate(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each rival."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for function in rivals.values():
        for _ in range(3):
            function()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            function()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: round(statistics.median(start.elapsed_time(stop) for start, stop in pairs) * 1e3, 2)
        for name, pairs in events.items()
    }


def _copy_of(size: int) -> Callable[[], object]:
    """A device copy that reads and writes `size` bytes together."""
    source = torch.empty(max(1, size // 2), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_speed(rounds: int) -> float:
    """GB/s of a large device copy, reads and writes together: the roof."""
    size = 4 << 30
    return round(size / alternate({"copy": _copy_of(size)}, rounds)["copy"] / 1e3, 1)


def logits_rows(batches: list[int], member_counts: list[int], dtypes: list[torch.dtype], rounds: int) -> list[dict]:
    """The fused kernel over B x N x dtype."""
    roof = copy_speed(rounds)
    rows = []
    for dtype in dtypes:
        for members in member_counts:
            compiled = torch.compile(plain_eager, dynamic=False)
            for batch in batches:
                logits = [torch.randn(batch, VOCABULARY, device="cuda", dtype=dtype) for _ in range(members)]
                weights = torch.linspace(1.0, 0.5, members, device="cuda")
                out = fused_logits(logits, weights)
                size = members * batch * VOCABULARY * dtype.itemsize
                rivals: dict[str, Callable[[], object]] = {
                    "triton": partial(fused_logits, logits, weights, out=out),
                    "eager": partial(plain_eager, logits, weights),
                    "compiled": partial(compiled, logits, weights),
                    "copy": _copy_of(size),
                }
                times = alternate(rivals, rounds)
                speed = size / times["triton"] / 1e3
                rows.append(
                    {
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
                        "times_compiled": round(times["compiled"] / times["triton"], 2),
                    }
                )
    return rows


def feature_rows(batch: int, rounds: int) -> list[dict]:
    """What each result on request adds to the time of argmax with log-probability, three members of bf16."""
    logits = [torch.randn(batch, VOCABULARY, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    weights = torch.ones(3, device="cuda")
    asked: dict[str, dict] = {"argmax": {}, "members": {"members": True}, "entropy": {"entropy": True}}
    asked |= {"top_k=4": {"top_k": 4}, "top_k=16": {"top_k": 16}}
    outs = {name: fused_logits(logits, weights, **options) for name, options in asked.items()}
    rivals = {name: partial(fused_logits, logits, weights, out=outs[name], **asked[name]) for name in asked}
    return [{"batch": batch, "result": name, "microseconds": time} for name, time in alternate(rivals, rounds).items()]


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

        def unfused(hidden=hidden, logits_out=logits_out):
            logits = [h_BD @ o_VD.T for h_BD, o_VD in zip(hidden, output, strict=True)]
            return fused_logits(logits, weights, out=logits_out)

        rivals: dict[str, Callable[[], object]] = {
            "fused_head": partial(fused_head, hidden, output, weights, out=out),
            "cuBLAS + kernel": unfused,
        }
        times = alternate(rivals, rounds)
        ratio = times["cuBLAS + kernel"] / times["fused_head"]
        rows.append({"batch": batch, "microseconds": times, "times_unfused": round(ratio, 2)})
    return rows


def run(everything: bool, quick: bool) -> dict:
    """All GPU measurements; `everything` adds fp16, float32, other N and larger batches."""
    rounds = 5 if quick else 50
    batches = [1, 8, 32, 64] if not everything else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    members = [3] if not everything else [1, 2, 3, 5, 8]
    dtypes = [torch.bfloat16] if not everything else [torch.bfloat16, torch.float16, torch.float32]
    return {
        "fused_logits": logits_rows(batches, members, dtypes, rounds),
        "results_on_request": [row for batch in (8, 64) for row in feature_rows(batch, rounds)],
        "fused_head": head_rows([1, 16, 64, 256] if everything else [16, 64], rounds),
    }
