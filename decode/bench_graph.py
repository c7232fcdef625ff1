"""A graphed step on a GPU against the reading of its weights: `python -m decode.bench_graph`.

Random weights of Llama-3.2-3B's and 1B's shapes, made on the device, in bf16. For each combination and number of rows:
milliseconds of a step as `translate` makes it (from the difference of two lengths), of a replay of its graph alone, and
the floor: the bytes of all weights over the device's measured copy bandwidth, reads and writes together. With
`--kernels` also the kernels that a replay ran, by the profiler.
"""

import statistics
import sys
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from decode.bench_shapes import SHAPES, random_model, random_prompts, step_work
from decode.engine.ensemble import Ensemble
from decode.engine.cuda_graph import ACTIVE
from decode.translate import translate
from benchmarks import common, kernels as bench_gpu
from minillama.cli import Parser
from minillama.errors import InputError, exit_code

MEMBERS = {"L": "llama-3.2-3b", "S": "llama-3.2-1b", "T": "llama-3.2-1b"}
SHORT, LONG, PROMPT, ROUNDS, REPLAYS, SHOWN = 4, 68, 32, 3, 50, 14


def seconds(ensemble: Ensemble, rows: int, tokens: int) -> tuple[float, int]:
    """Of a call of `translate`, and its steps."""
    vocabulary = ensemble.members[0].model.config.vocab_size
    prompts = random_prompts(vocabulary, rows, PROMPT, PROMPT, seed=rows)
    torch.cuda.synchronize()
    started = time.perf_counter()
    steps = translate(ensemble, prompts, tokens, batch_size=rows, ignore_eos=True).steps
    torch.cuda.synchronize()
    return time.perf_counter() - started, steps


def measure(ensemble: Ensemble, rows: int, roof: float, kernels: bool) -> None:
    """Prints a line, and the kernels."""
    for _ in range(2):  # kernels are compiled, graphs recorded
        seconds(ensemble, rows, LONG)
    found = []
    for _ in range(ROUNDS):
        (short, few), (long, many) = seconds(ensemble, rows, SHORT), seconds(ensemble, rows, LONG)
        found.append((long - short) / (many - few) * 1e3)
    assert ensemble.step_graphs is not None
    graphs = ensemble.step_graphs.graphs
    graph = graphs[max(graphs, key=lambda shape: (shape.rows == rows, shape.keys))].graph
    ensemble.step_graphs.inputs_IB[ACTIVE].zero_()  # positions stand still: a replay would run past the caches' end
    ensemble.step_graphs.held = []
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    replay = (time.perf_counter() - started) / REPLAYS * 1e3
    floor = step_work([member.model.config for member in ensemble.members], "bfloat16", 0, 0)[0] / roof / 1e6
    print(
        f"{ensemble.combine:12} B={rows:<3} step {statistics.median(found):6.3f} ms, replay {replay:6.3f} ms, "
        f"weights read in {floor:6.3f} ms",
        flush=True,
    )
    if kernels:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
        times: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for event in profiler.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                times[event.name[:100]] += event.device_time_total
                counts[event.name[:100]] += 1
        for name, microseconds in times.most_common(SHOWN):
            print(f"  {microseconds:8.1f} us {counts[name]:4} x {microseconds / counts[name]:7.2f}  {name}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m decode.bench_graph", description="Graphed steps on a GPU against their bytes.")
    parser.add_argument("--combine", action="append", help="expression over L (3B), S and T (1B); default L + S + T, L")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--kernels", action="store_true", help="also the kernels of a replay")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("decode.bench_graph measures on a GPU, and there is none here")
    roof = common.copy_speed(10)
    print(f"{torch.cuda.get_device_name()}, a copy moves {roof} GB/s", flush=True)
    models = {name: random_model(SHAPES[shape], seed) for seed, (name, shape) in enumerate(MEMBERS.items())}
    for combine in options.combine or ["L + S + T", "L"]:
        ensemble = Ensemble({name: models[name] for name in models if name in combine}, combine)
        for rows in options.batch:
            measure(ensemble, rows, roof, options.kernels)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
