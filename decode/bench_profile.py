"""Where the time of a step goes, by torch.profiler: two runs of unequal length, so that prefill falls out.

An operation counts by its own time. What the CPU runs to choose the token counts as `choose`, products as `matmul`.
The profiler slows Python down and leaves operations as they are, so `python` is the time of a step without the profiler
(the median) less the operations' own time: what is left over, a lane's waiting among it, and as noisy as both.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "addmm", "matmul", "_weight_int8pack_mm", "_int_mm")  # and whatever is called linear or gemm
ATTENTION = ("attention", "softmax", "bmm", "baddbmm")
COPIES = ("copy", "cat", "clone", "index", "scatter", "_to_copy", "contiguous", "embedding", "stack", "fill", "zero")
SHOWN = 8


def part_of(name: str, around: list[str]) -> str:
    """The part of a step that an operation belongs to; around: what it runs in, operations and named ranges."""
    plain = name.rsplit("::", 1)[-1]
    if "fused_logits" in around:
        return "choose"
    if any(word in plain for word in ATTENTION):
        return "attention"
    if plain in PRODUCTS or "linear" in plain or "gemm" in plain:
        return "matmul"
    if any(word in plain for word in COPIES):
        return "copies and caches"
    return "norm and elementwise"


def _own_times(run: Callable[[], object], device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds by part and by operation."""
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
    parts: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        if "::" not in event.name:  # a named range: only its operations count
            continue
        around = []
        parent = event.cpu_parent
        while parent is not None:
            around.append(parent.name)
            parent = parent.cpu_parent
        own = event.self_device_time_total if device.startswith("cuda") else event.self_cpu_time_total
        part = part_of(event.name, around)
        parts[part] += own
        operations[f"{event.name} ({part})"] += own
    return parts, operations


def profile_steps(generate: Callable[[int], dict[str, Any]], short: int, long: int, device: str) -> dict[str, Any]:
    """Milliseconds of a step by part, their shares, and the operations that take longest.

    generate: decodes so many new tokens and returns its `clock`, the seconds at the end of each step.
    """
    generate(short)
    clock = generate(long)["clock"][short - 1 :]
    step_ms = statistics.median(end - start for start, end in itertools.pairwise(clock)) * 1e3
    steps = long - short
    _own_times(lambda: generate(short), device)  # the profiler's own first use
    parts_short, operations_short = _own_times(lambda: generate(short), device)
    parts_long, operations_long = _own_times(lambda: generate(long), device)

    def per_step(long_us: dict[str, float], short_us: dict[str, float]) -> dict[str, float]:
        found = {name: max(0.0, value - short_us.get(name, 0.0)) / 1e3 / steps for name, value in long_us.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    parts = per_step(parts_long, parts_short)
    parts["python"] = max(0.0, step_ms - sum(parts.values()))
    total = sum(parts.values())
    top = list(per_step(operations_long, operations_short).items())[:SHOWN]
    return {
        "ms_per_step": round(step_ms, 3),
        "ms": {name: round(value, 3) for name, value in parts.items()},
        "shares": {name: round(value / total, 3) for name, value in parts.items()},
        "longest_operations_ms": {name: round(value, 3) for name, value in top},
    }
