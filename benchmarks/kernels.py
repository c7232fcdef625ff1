"""The kernels against eager PyTorch, torch.compile and the memory's own speed: `python -m benchmarks.kernels [--all]`.

On a GPU every rival is a CUDA graph of many launches, each over another set of inputs, together several times the L2:
the host's time is not in the figures, and no launch finds its inputs in the cache. A figure is the time of a replay by
CUDA events over the number of launches, the median of rounds in which the rivals take turns.

    B sequences  V vocabulary  N members  D inputs  O outputs
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import StealClock, alternate, copy_speed, header, machine_name, read_speed, save
from kernels import PackedLinear, Sampling, fused_head, fused_logits
from kernels.cpu.packed_linear import DTYPES, has_bfloat16_instructions, has_float16_product
from kernels.types import SPLIT
from minillama.cli import Parser
from minillama.errors import exit_code

VOCABULARY = 128_256
# Bytes of all sets of inputs of one rival, several times the L2 of an H200 (60 MB), and the number of sets.
ROTATED_BYTES, MOST_SETS, LEAST_SETS = 256 << 20, 1024, 4
EXAMPLES = """examples:
  python -m benchmarks.kernels                 this machine, some minutes; the figures as a table
  python -m benchmarks.kernels --all --json    every shape and dtype: what a machine with a GPU runs unattended
"""


def plain_eager(logits: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write without this package: cast, scale, add, log_softmax, argmax; no masks and no flags."""
    x_BV = logits[0].float() * weights[0]
    for number in range(1, len(logits)):
        x_BV = x_BV + logits[number].float() * weights[number]
    token_B = x_BV.argmax(dim=-1)
    return token_B, torch.log_softmax(x_BV, dim=-1).gather(1, token_B[:, None])[:, 0]


def moved_bytes(batch: int, members: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes that `plain_eager` and the Triton kernel move for token and log-probability, by counting their operands.

    Eager, per entry: N casts (none of float32), N products and N - 1 sums in float32, an argmax and a log_softmax. The
    kernel: every logit once; for each split 16 bytes of partial results, written and read, an atomic counter and the
    weights; 16 bytes of results a sequence.
    """
    size, splits = dtype.itemsize, -(-VOCABULARY // SPLIT)
    casts = 0 if dtype == torch.float32 else size + 4
    eager = batch * VOCABULARY * (members * (casts + 8) + (members - 1) * 12 + 4 + 8)
    fused = batch * (VOCABULARY * members * size + splits * (2 * 16 + 8 + 4 * members) + 16)
    shape = {"batch": batch, "vocabulary": VOCABULARY, "members": members, "dtype": _name(dtype)}
    return shape | {"eager_bytes": eager, "fused_bytes": fused, "ratio": round(eager / fused, 2)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random_logits(batch: int, vocabulary: int, members: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(batch, vocabulary, device=device).to(dtype) for _ in range(members)]


def _requests(batch: int, device: str) -> dict[str, dict[str, Any]]:
    """What can be requested of `fused_logits`, beside the plain argmax; without `weights` they are all one."""
    row_B = torch.arange(batch, device=device)
    targets_B4 = torch.arange(4 * batch, device=device).view(batch, 4)
    weights_NB = torch.ones(3, batch, device=device)
    weights_NB[1, ::2] = 0
    return {
        "argmax": {},
        "one member left out of every other sequence": {"weights": weights_NB},
        "members": {"members": True},
        "members and 4 targets": {"members": True, "targets": targets_B4},
        **{f"top_k={k}": {"top_k": k} for k in (4, 16, 32)},
        "sample": {"sample": Sampling(row_B, row_B, row_B, torch.full((batch,), 0.8, device=device))},
        "sample of top_k=50, top_p=0.9": {"sample": Sampling(row_B, row_B, row_B, 0.8, 50, 0.9)},
    }


def cpu_logits(batches: Sequence[int], vocabulary: int, rounds: int, limit: float) -> list[dict[str, Any]]:
    """The CPU path against plain eager, three members; limit: GB/s at which memory is read."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in batches:
            logits, weights = _random_logits(batch, vocabulary, 3, dtype, "cpu"), torch.tensor([1.0, 0.5, -0.5])
            ours, eager = partial(fused_logits, logits, weights), partial(plain_eager, logits, weights)
            times = alternate({"cpu path": ours, "eager": eager}, rounds)
            speed = 3 * batch * vocabulary * dtype.itemsize / times["cpu path"]["least_ms"] / 1e6
            rows.append(
                {"batch": batch, "vocabulary": vocabulary, "members": 3, "dtype": _name(dtype), "ms": times}
                | {"times_eager": round(times["eager"]["median_ms"] / times["cpu path"]["median_ms"], 2)}
                | {"gigabytes_per_second": round(speed, 2), "share_of_roof": round(speed / limit, 3)}
            )
    return rows


def cpu_requests(batch: int, vocabulary: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of every kind of request, three members of float32."""
    logits, weights = _random_logits(batch, vocabulary, 3, torch.float32, "cpu"), torch.ones(3)
    rivals = {
        name: partial(fused_logits, logits, **({"weights": weights} | options))
        for name, options in _requests(batch, "cpu").items()
    }
    return [{"batch": batch, "result": name, "ms": ms} for name, ms in alternate(rivals, rounds).items()]


def cpu_linear(batches: Sequence[int], inputs: int, outputs: int, rounds: int) -> list[dict[str, Any]]:
    """Packed linear layers against `F.linear` and `weight @ x.T`, each in float32 and bf16."""
    weight_OD = torch.randn(outputs, inputs) / inputs**0.5
    half_OD = weight_OD.bfloat16()
    dtypes = [dtype for dtype in DTYPES if dtype != "auto" and (dtype != "float16" or has_float16_product())]
    packed = {dtype: PackedLinear(weight_OD, dtype=dtype) for dtype in dtypes}
    rows = []
    for batch in batches:
        x_BD = torch.randn(batch, inputs)
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
        best = min(median[f"packed {dtype}"] for dtype in packed)
        best_rival = min(time_ for name, time_ in median.items() if not name.startswith("packed"))
        rows.append(
            {"batch": batch, "shape": [inputs, outputs], "ms": times}
            | {"float32_times_linear": round(median["F.linear float32"] / median["packed float32"], 2)}
            | {"best_times_best_rival": round(best_rival / best, 2)}
        )
    return rows


def head_memory(batch: int, vocabulary: int, widths: Sequence[int]) -> dict[str, Any]:
    """Peak memory over the weights while targets are scored by `fused_head`, in a process of its own."""
    code = f"from benchmarks.kernels import _score; _score({batch}, {vocabulary}, {list(widths)})"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _score(batch: int, vocabulary: int, widths: Sequence[int]) -> None:
    """Print by how much this process's peak grows while it scores."""
    torch.manual_seed(0)
    output = [torch.empty(vocabulary, width, dtype=torch.bfloat16).normal_() for width in widths]
    hidden = [torch.randn(batch, width).div_(width**0.5).bfloat16() for width in widths]
    weights = [1.0] * len(widths)
    # the libraries' own buffers come with the first matmul and are not what is measured
    fused_head([hidden_BD[:2] for hidden_BD in hidden], [output_VD[:64] for output_VD in output], weights)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    fused_head(hidden, output, weights, targets=torch.randint(0, vocabulary, (batch,)))
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"rows": batch, "vocabulary": vocabulary, "widths": widths, "seconds": round(seconds, 2)}
    print(json.dumps(found | {"peak_megabytes_over_weights": round(peak, 1)}))


def on_cpu(everything: bool, quick: bool) -> dict[str, Any]:
    """All CPU figures. quick: in seconds, to see that they run; everything: also the large vocabulary and model."""
    rounds = 3 if quick else 15
    limit = read_speed(rounds, 64 if quick else 512)
    batches = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    logits = cpu_logits(batches, 5_000 if quick else 49_152, rounds, limit)
    if everything:
        logits += cpu_logits(batches, VOCABULARY, rounds, limit)
    linear = cpu_linear(batches if quick else (*batches, 3, 6, 12, 24, 48), 2048, 512 if quick else 16_384, rounds)
    return {
        "read_gigabytes_per_second": limit,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": has_bfloat16_instructions(),
        "fused_logits": logits,
        "results_on_request": cpu_requests(4, 5_000 if quick else 49_152, rounds),
        "packed_linear": linear,
        "fused_head": head_memory(50, 5_000, [64] * 3) if quick else head_memory(1000, VOCABULARY, [1024] * 3),
    }


def alternate_graphs(rivals: Mapping[str, Callable[[int], object]], sets: int, rounds: int) -> dict[str, float]:
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
        results = [function(number) for number in range(sets)]
    return graph, results


def _each(function: Callable[..., object], sets: Sequence[Any], *rest: Any, **options: Any) -> Callable[[int], object]:
    """A rival: the function of the numbered set of inputs."""
    return lambda number: function(sets[number], *rest, **options)


def _copies(size: int, sets: int) -> Callable[[int], object]:
    """A rival that reads and writes `size` bytes together, by a kernel: a graph's own copies are slower."""
    source = torch.zeros(sets, max(1, size // 8), device="cuda")
    target = torch.empty_like(source)
    return lambda number: torch.mul(source[number], 1.0, out=target[number])


def _sets(size: int) -> int:
    """How many sets of inputs of so many bytes make sure that a launch's own ones are not in the cache."""
    return max(LEAST_SETS, min(MOST_SETS, -(-ROTATED_BYTES // size)))


def gpu_logits(batch: int, members: int, dtype: torch.dtype, rounds: int, limit: float) -> dict[str, Any]:
    """The fused kernel against eager and a copy; torch.compile, seconds for each shape, for three members of bf16."""
    size = members * batch * VOCABULARY * dtype.itemsize
    sets = _sets(size)
    logits = [_random_logits(batch, VOCABULARY, members, dtype, "cuda") for _ in range(sets)]
    weights = torch.linspace(1.0, 0.5, members, device="cuda")
    rivals = {
        "triton": _each(fused_logits, logits, weights, out=fused_logits(logits[0], weights)),
        "eager": _each(plain_eager, logits, weights),
        "copy": _copies(size, sets),
    }
    if (members, dtype) == (3, torch.bfloat16):
        rivals["compiled"] = _each(torch.compile(plain_eager, dynamic=False), logits, weights)
    times = alternate_graphs(rivals, sets, rounds)
    speed = size / times["triton"] / 1e3
    row = {"batch": batch, "vocabulary": VOCABULARY, "members": members, "dtype": _name(dtype), "microseconds": times}
    row |= {f"times_{name}": round(times[name] / times["triton"], 2) for name in ("eager", "compiled") if name in times}
    return row | {
        "gigabytes_per_second": round(speed, 1),
        "roof_gigabytes_per_second": limit,
        "share_of_roof": round(speed / limit, 3),
        "share_of_copy_of_same_bytes": round(times["copy"] / times["triton"], 3),
    }


def gpu_requests(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of every kind of request, three members of bf16."""
    sets = _sets(3 * batch * VOCABULARY * 2)
    logits = [_random_logits(batch, VOCABULARY, 3, torch.bfloat16, "cuda") for _ in range(sets)]
    rivals = {}
    for name, options in _requests(batch, "cuda").items():
        options = {"weights": torch.ones(3, device="cuda")} | options
        rivals[name] = _each(fused_logits, logits, out=fused_logits(logits[0], **options), **options)
    times = alternate_graphs(rivals, sets, rounds)
    return [{"batch": batch, "result": name, "microseconds": time_} for name, time_ in times.items()]


def on_gpu(everything: bool, quick: bool) -> dict[str, Any]:
    """All GPU figures; everything: also fp16, float32, other N and more batches."""
    rounds = 5 if quick else 50
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256) if everything else (1, 8, 32, 64, 256)
    members = (1, 2, 3, 5, 8) if everything else (3,)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if everything else (torch.bfloat16,)
    limit = copy_speed(rounds)
    shapes = [(batch, count, dtype) for dtype in dtypes for count in members for batch in batches]
    return {
        "fused_logits": [gpu_logits(*shape, rounds, limit) for shape in shapes],
        "results_on_request": [row for batch in (8, 64) for row in gpu_requests(batch, rounds)],
    }


def measure(everything: bool, quick: bool) -> dict[str, Any]:
    """All that this machine can measure."""
    steal = StealClock()
    kind, figures = ("gpu", on_gpu) if torch.cuda.is_available() else ("cpu", on_cpu)
    dtypes = (torch.bfloat16, torch.float32)
    moved = [moved_bytes(batch, members, dtype) for dtype in dtypes for members in (1, 2, 3) for batch in (1, 16)]
    result = header() | {"all": everything, "moved_bytes": moved, kind: figures(everything, quick)}
    return result | {"steal_share": steal.share()}


def show(result: dict[str, Any]) -> None:
    """The figures as tables."""
    print(f"{result['device']}, " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print(f"\nbytes moved for the next token and its log-probability, V = {VOCABULARY:,}")
    for row in result["moved_bytes"]:
        eager, fused = row["eager_bytes"] / 2**20, row["fused_bytes"] / 2**20
        shape = f"  B={row['batch']:<4}N={row['members']} {row['dtype']:9}"
        print(f"{shape} eager {eager:8.1f} MB, fused {fused:6.1f} MB: {row['ratio']:.1f} times fewer")
    figures = result.get("gpu") or result["cpu"]
    print("\nfused_logits: against eager, and share of the speed of a copy (GPU) or of memory reads (CPU)")
    for row in figures["fused_logits"]:
        shape = f"  B={row['batch']:<4}N={row['members']} V={row['vocabulary']:<7} {row['dtype']:9}"
        speed = f"{row['gigabytes_per_second']:8.1f} GB/s, {row['share_of_roof']:6.1%} of the limit"
        print(f"{shape} {row['times_eager']:6.2f} times eager, {speed}")
    print("\nfused_logits by what is requested")
    for row in figures["results_on_request"]:
        time_ = f"{row['microseconds']:.1f} us" if "microseconds" in row else f"{row['ms']['median_ms']:.2f} ms"
        print(f"  B={row['batch']:<4}{row['result']:44} {time_}")
    if "cpu" not in result:
        return
    print("\npacked_linear, median ms")
    for row in figures["packed_linear"]:
        times = ", ".join(f"{name} {values['median_ms']:.2f}" for name, values in row["ms"].items())
        print(f"  B={row['batch']:<3}{row['shape'][0]}->{row['shape'][1]}: {times}")
    head = figures["fused_head"]
    print(f"\nfused_head: {head['peak_megabytes_over_weights']:.0f} MB over the weights in {head['seconds']:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0], epilog=EXAMPLES)
    parser.add_argument("--all", action="store_true", help="every shape and dtype")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results/kernels)")
    options = parser.parse_args(arguments)
    print(f"measuring on {machine_name()}, {torch.get_num_threads()} threads", file=sys.stderr)
    result = measure(options.all, options.quick)
    path = save(result, "kernels", options.output)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    print(f"saved as {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
