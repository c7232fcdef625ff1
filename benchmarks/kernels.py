"""The kernels against eager PyTorch, torch.compile and a copy of the same bytes: `python -m benchmarks.kernels`.

On a GPU every rival is a CUDA graph of many launches, each over another set of inputs, together several times the L2:
the host's time is not in the figures, and no launch finds its inputs in the cache. A figure is the time of a replay by
CUDA events over the number of launches, the median of rounds in which the rivals alternate.

    B sequences  V vocabulary  N members  D inputs  O outputs
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import StealClock, alternate, copy_speed, header, read_speed, save
from kernels import PackedLinear, Sampling, fused_logits
from kernels.cpu.packed_linear import DTYPES, has_float16_product
from minillama.cli import Parser
from minillama.errors import exit_code

VOCABULARY = 128_256
# Bytes of all sets of inputs of one rival, several times the L2 of an H200 (60 MB), and the number of sets.
ROTATED_BYTES, MOST_SETS, LEAST_SETS = 256 << 20, 1024, 4
EXAMPLES = """examples:
  python -m benchmarks.kernels                          this machine, some minutes
  python -m benchmarks.kernels --all --json --save      every shape and dtype
"""
Rival = Callable[[int], object]  # of the number of a set of inputs


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0], epilog=EXAMPLES)
    parser.add_argument("--all", action="store_true", help="every shape and dtype")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write the results to benchmarks/results/kernels/")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    steal = StealClock()
    limit, rows = (gpu_rows if torch.cuda.is_available() else cpu_rows)(options.all, options.quick)
    result = header() | {"all": options.all, "read_gigabytes_per_second": limit, "rows": rows}
    result["steal_share"] = steal.share()
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.save:
        print(f"saved in {save(result, 'kernels')}", file=sys.stderr)
    return 0


def cpu_rows(everything: bool, quick: bool) -> tuple[float, list[dict[str, Any]]]:
    """GB/s at which memory is read, and all figures."""
    rounds, vocabulary = (3, 5_000) if quick else (15, 49_152)
    batches = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    limit = read_speed(rounds, 64 if quick else 512)
    rows = [
        logits_row(batch, entries, 3, dtype, rounds, limit)
        for entries in (vocabulary, *([VOCABULARY] if everything else []))
        for dtype in (torch.float32, torch.bfloat16)
        for batch in batches
    ]
    rows += request_rows(4, vocabulary, torch.float32, rounds)
    shape = (2048, 512 if quick else 16_384)
    rows += linear_rows(batches if quick else (*batches, 3, 6, 12, 24, 48), *shape, rounds)
    return limit, rows


def gpu_rows(everything: bool, quick: bool) -> tuple[float, list[dict[str, Any]]]:
    """GB/s of a large copy, and all figures; everything: also fp16, float32, other N and more batches."""
    rounds = 5 if quick else 50
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256) if everything else (1, 8, 32, 64, 256)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if everything else (torch.bfloat16,)
    limit = copy_speed(rounds)
    rows = [
        logits_row(batch, VOCABULARY, members, dtype, rounds, limit)
        for dtype in dtypes
        for members in ((1, 2, 3, 5, 8) if everything else (3,))
        for batch in batches
    ]
    for batch in (8, 64):
        rows += request_rows(batch, VOCABULARY, torch.bfloat16, rounds)
    return limit, rows


def logits_row(
    batch: int, vocabulary: int, members: int, dtype: torch.dtype, rounds: int, limit: float
) -> dict[str, Any]:
    """Token and log-probability; torch.compile, seconds for each shape, only for three members of bf16 on a GPU."""
    sets = random_sets(batch, vocabulary, members, dtype)
    size = members * batch * vocabulary * dtype.itemsize
    weights = torch.linspace(1.0, 0.5, members, device=sets[0][0].device)
    rivals: dict[str, Rival] = {
        "fused": fused(sets, weights=weights),
        "eager": lambda number: plain_eager(sets[number], weights),
        "copy": copies(size, len(sets), weights.device),
    }
    if weights.is_cuda and (members, dtype) == (3, torch.bfloat16):
        compiled = torch.compile(plain_eager, dynamic=False)
        rivals["compiled"] = lambda number: compiled(sets[number], weights)
    times = microseconds(rivals, len(sets), rounds)
    speed = size / times["fused"] / 1e3
    row = {"kernel": "fused_logits", "batch": batch, "vocabulary": vocabulary, "members": members}
    row |= {"dtype": str(dtype).removeprefix("torch."), "microseconds": times}
    row |= {f"times_{name}": round(times[name] / times["fused"], 2) for name in times if name != "fused"}
    return row | {"gigabytes_per_second": round(speed, 1), "share_of_read_bandwidth": round(speed / limit, 3)}


def request_rows(batch: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Every kind of result on request, three members."""
    sets = random_sets(batch, vocabulary, 3, dtype)
    device = sets[0][0].device
    row_B = torch.arange(batch, device=device)
    targets_B4 = torch.arange(4 * batch, device=device).view(batch, 4)
    temperature_B, ones_N = torch.full((batch,), 0.8, device=device), torch.ones(3, device=device)
    weights_NB = torch.ones(3, batch, device=device)
    weights_NB[1, ::2] = 0
    requests: dict[str, dict[str, Any]] = {
        "argmax": {},
        "one member left out of every other sequence": {"weights": weights_NB},
        "members": {"members": True},
        "members and 4 targets": {"members": True, "targets": targets_B4},
        **{f"top_k={k}": {"top_k": k} for k in (4, 16, 32)},
        "sample": {"sample": Sampling(row_B, row_B, row_B, temperature_B)},
        "sample of top_k=50, top_p=0.9": {"sample": Sampling(row_B, row_B, row_B, 0.8, 50, 0.9)},
    }
    rivals = {name: fused(sets, **({"weights": ones_N} | requested)) for name, requested in requests.items()}
    times = microseconds(rivals, len(sets), rounds)
    row = {"kernel": "fused_logits", "batch": batch, "vocabulary": vocabulary}
    return [row | {"request": name, "microseconds": value} for name, value in times.items()]


def linear_rows(batches: Sequence[int], inputs: int, outputs: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Packed linear layers against `F.linear` and `weight @ x.T`, each in float32 and bf16."""
    weight_OD = torch.randn(outputs, inputs) / inputs**0.5
    packed = {d: PackedLinear(weight_OD, dtype=d) for d in DTYPES[1:] if d != "float16" or has_float16_product()}
    weights = {"float32": weight_OD, "bfloat16": weight_OD.bfloat16()}
    for batch in batches:
        x_BD = torch.randn(batch, inputs)
        x = {"float32": x_BD, "float16": x_BD, "bfloat16": x_BD.bfloat16(), "int8": x_BD.bfloat16()}
        rivals: dict[str, Callable[[], object]] = {}
        for dtype, plain in weights.items():
            rivals[f"F.linear {dtype}"] = partial(F.linear, x[dtype], plain)
            rivals[f"weight @ x.T {dtype}"] = partial(torch.mm, plain, x[dtype].T)
        rivals |= {f"packed {dtype}": partial(layer, x[dtype]) for dtype, layer in packed.items()}
        with torch.inference_mode():
            median = {name: values["median_ms"] for name, values in alternate(rivals, rounds).items()}
        best = min(ms for name, ms in median.items() if name.startswith("packed"))
        best_rival = min(ms for name, ms in median.items() if not name.startswith("packed"))
        row = {"kernel": "packed_linear", "batch": batch, "shape": [inputs, outputs], "milliseconds": median}
        row["float32_times_linear"] = round(median["F.linear float32"] / median["packed float32"], 2)
        yield row | {"best_times_best_rival": round(best_rival / best, 2)}


def plain_eager(logits: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write without this package: cast, scale, add, log_softmax, argmax; no masks and no flags."""
    x_BV = logits[0].float() * weights[0]
    for number in range(1, len(logits)):
        x_BV = x_BV + logits[number].float() * weights[number]
    token_B = x_BV.argmax(dim=-1)
    return token_B, torch.log_softmax(x_BV, dim=-1).gather(1, token_B[:, None])[:, 0]


def fused(sets: Sequence[Any], **options: Any) -> Rival:
    out = fused_logits(sets[0], **options) if sets[0][0].is_cuda else None
    return lambda number: fused_logits(sets[number], **options, out=out)


def copies(size: int, sets: int, device: torch.device) -> Rival:
    """Reads and writes `size` bytes together, by a kernel: a graph's own copies are slower."""
    source = torch.zeros(sets, max(1, size // 8), device=device)
    target = torch.empty_like(source)
    return lambda number: torch.mul(source[number], 1.0, out=target[number])


def random_sets(batch: int, vocabulary: int, members: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Sets of logits: on a GPU so many that a launch does not find its own in the cache."""
    count, device = 1, "cpu"
    if torch.cuda.is_available():
        size = members * batch * vocabulary * dtype.itemsize
        count, device = max(LEAST_SETS, min(MOST_SETS, -(-ROTATED_BYTES // size))), "cuda"
    shape = batch, vocabulary
    return [[torch.randn(shape, device=device).to(dtype) for _ in range(members)] for _ in range(count)]


def microseconds(rivals: Mapping[str, Rival], sets: int, rounds: int) -> dict[str, float]:
    """Median of one call of each rival."""
    if not torch.cuda.is_available():
        times = alternate({name: partial(rival, 0) for name, rival in rivals.items()}, rounds)
        return {name: round(values["median_ms"] * 1e3, 1) for name, values in times.items()}
    graphs = {name: recorded(rival, sets) for name, rival in rivals.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rivals}
    for _ in range(rounds + 2):
        for name, (graph, _results) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {  # the first two replays bring the graph to the device
        name: round(statistics.median(start.elapsed_time(stop) for start, stop in pairs[2:]) * 1e3 / sets, 2)
        for name, pairs in events.items()
    }


def recorded(rival: Rival, sets: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of one call for each set, and the results, which the graph writes again at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            rival(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [rival(number) for number in range(sets)]
    return graph, results


if __name__ == "__main__":
    sys.exit(exit_code(main))
