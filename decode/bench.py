"""Decoding against its peers on the machine at hand: `python -m decode.bench [--json]`.

Ours against transformers (eager, the same models, logits summed by hand) and, for a single model, CTranslate2 and
OpenVINO where they are installed. Every system has a process of its own and they take turns within one run, so what
else the machine does meets all of them alike. Every run becomes one JSON file with device, versions and date under
decode/results/; `--plot` draws them.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from corpora import read_lines, sample
from decode import bench_sections as sections
from decode.bench_measure import Bench, System, add_shares, step_rows
from decode.bench_peers import export_for_openvino
from decode.bench_plot import plot
from decode.bench_shapes import SHAPES, Models, prepare, sentence_prompts
from decode.bench_show import show
from decode.options import DEFAULT_ROWS
from decode.engine.speculative import check_mode
from benchmarks.common import machine_name as device_name
from benchmarks.common import save
from minillama.machine import processor_name, versions
from benchmarks.common import alternate, read_speed
from minillama import InputError
from minillama.cli import Parser
from minillama.errors import exit_code

SPECULATE = ["off", "auto", "2", "4", "7"]
RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("ours", "transformers", "ctranslate2", "openvino")
PEERS = ("transformers", "ctranslate2", "openvino", "sacrebleu", "numpy")
EXAMPLES = """examples:
  python -m decode.bench                                   SmolLM2's shape, 3 members and 1, B = 1, 4, 16
  python -m decode.bench --members 1 --openvino-python openvino-export/bin/python
  python -m decode.bench --model llama-3.2-1b --members 1 --dtype bfloat16,int8 --peer-dtype bfloat16,float32
  python -m decode.bench --model demo --dev dev.ja dev.en --no-steps
  python -m decode.bench --model demo --speculation --combine "L + S_src + S_tgt" --combine "L - 0.5*S_src"
  python -m decode.bench --sweep members,context,sentences
  python -m decode.bench --plot                            draw all results so far
"""


def machine(device: str, quick: bool) -> dict[str, Any]:
    """What the device reads and computes at best, measured now."""
    size, rounds = (256, 2) if quick else (2048, 5) if device == "cpu" else (8192, 5)
    dtypes = (torch.float32, torch.bfloat16)
    speeds = {}
    for dtype in dtypes:
        x_DD = torch.randn(size, size, device=device).to(dtype)
        if device == "cpu":
            product = partial(torch.mm, x_DD, x_DD)
            milliseconds = alternate({"product": product}, rounds)["product"]["least_ms"]
        else:
            from benchmarks import common, kernels as bench_gpu

            rival = bench_gpu._each(torch.mm, [x_DD, x_DD], x_DD)
            milliseconds = bench_gpu.alternate_graphs({"product": rival}, 2, rounds)["product"] / 1e3
        speeds[str(dtype).removeprefix("torch.")] = round(2 * size**3 / milliseconds / 1e6, 1)
    if device == "cpu":
        return {"read_gigabytes_per_second": read_speed(rounds, 32 if quick else 1024), "matmul_gigaflops": speeds}
    from benchmarks import common, kernels as bench_gpu

    # a copy reads and writes: the device's bytes a second, whichever way they go
    return {"read_gigabytes_per_second": common.copy_speed(rounds), "matmul_gigaflops": speeds}


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The best of two measurements, one before and one after the run: a share is one of what the machine can do."""
    return {
        name: better(value, other[name]) if isinstance(value, dict) else max(value, other[name])
        for name, value in one.items()
    }


def all_versions() -> dict[str, str]:
    found = versions()
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def text_of(options: argparse.Namespace, models: Models) -> sections.Text:
    """The sentences of `--dev`, or the built-in sample, as every member reads them; random models have random ones."""
    if models.random:
        return sections.random_text(models, options.limit or 100)
    if options.dev:
        source, references = (list(read_lines(Path(name))) for name in options.dev)
        if len(source) != len(references):
            raise InputError(f"{options.dev[0]} has {len(source)} lines, {options.dev[1]} {len(references)}")
    else:
        pairs = sample(options.source, options.target)
        source, references = list(pairs.source), list(pairs.target)
    if not source:
        raise InputError(f"{options.dev[0]}: no sentences")
    count = options.limit or len(source)
    prompts, stops = sentence_prompts(models, source[:count], options.source, options.target)
    return sections.Text(prompts, stops, options.max_new_tokens, options.target, references[:count])


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All that was asked for, as one JSON object."""
    torch.set_num_threads(options.threads)
    most = max([*options.members, *(options.member_counts if "members" in options.sweep else [])])
    combinations = options.combine or [None]
    given = prepare(options.model, most, work)
    models = given.combined(combinations[0])
    bench = Bench(options.threads, options.rounds, options.device, work, options.turns, options.clock, options.patience)
    before = machine(options.device, options.quick)
    ours = [System("ours", dtype) for dtype in options.dtype if "ours" in options.systems]
    peers = [System(name, dtype) for name in options.systems if name != "ours" for dtype in options.peer_dtype]
    summed = [*ours, *(peer for peer in peers if peer.name == "transformers")]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor_name() if options.device == "cpu" else device_name(),
        "threads": options.threads,
        "clock": options.clock,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": all_versions(),
        "models": {"shape": models.shape, "combine": models.combine, "names": list(models.folders)},
        "arguments": options.spelled,
        "machine": before,
        "rows": [],
    }
    if not options.no_steps:
        for count in options.members if models.random else [len(models.folders)]:
            part = models.first(count) if models.random else models
            if count == 1 and options.openvino_python:
                for dtype in options.peer_dtype:
                    export_for_openvino(options.openvino_python, Path(next(iter(part.folders.values()))), dtype, work)
            cases = sections.equal_cases(part, options.batch, options.prompt, options.steps)
            result["rows"] += step_rows(bench, [*ours, *peers], part, cases, profile=not options.no_profile)
    largest = models.first(max(options.members)) if models.random else models
    if "members" in options.sweep:
        counts = [count for count in options.member_counts if count <= len(models.folders)]
        result["member_sweep"] = sections.member_rows(bench, summed, models, counts, options.prompt, options.steps)
    if "context" in options.sweep:
        result["context_sweep"] = sections.context_rows(
            bench, summed, models.first(1), options.contexts, options.batch[0], options.steps
        )
    if "sentences" in options.sweep:
        result["sentence_sweep"] = sections.sentence_rows(
            bench, summed, largest, text_of(options, largest), options.sentences, options.sweep_batch
        )
    if options.dev:
        result["dev"] = sections.text_rows(
            bench, summed, largest, text_of(options, largest), options.sweep_batch, (False, True), options.own_batch
        )
    if options.speculation:
        result["speculation"] = [
            row
            for part in (given.combined(combine) if combine else largest for combine in combinations)
            for batch in options.batch
            for row in sections.speculation_rows(bench, ours[0], part, text_of(options, part), batch, options.speculate)
        ]
    result["machine"] = better(before, machine(options.device, options.quick))
    for section in ("rows", "member_sweep", "context_sweep"):
        add_shares(result.get(section, []), result["machine"])
    result["notes"] = bench.notes
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def words(text: str) -> list[str]:
        return text.split(",")

    parser = Parser(
        prog="python -m decode.bench",
        description="Decoding against transformers, CTranslate2 and OpenVINO on this machine.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", action="append", help=f"[NAME=]folder or shape with random weights ({shapes}), or demo; repeatable")
    add("--combine", action="append", help="expression over the names (default: their sum); more for --speculation")
    add("--members", type=numbers, help="how many models of one shape (default 3,1)")
    add("--batch", type=numbers, default=[1, 4, 16], help="batch sizes (default 1,4,16)")
    add("--dtype", type=words, default=["float32"], help="ours: float32 (default), float16, bfloat16, int8, auto")
    add("--peer-dtype", type=words, default=["float32"], help="the others' (default float32)")
    add("--systems", type=words, default=list(SYSTEMS), help=f"of {','.join(SYSTEMS)}; one not installed is left out")
    add("--steps", type=int, default=32, help="decoding steps timed (default 32)")
    add("--prompt", type=int, default=32, help="tokens of the prompts of a step (default 32)")
    add("--rounds", type=int, default=5, help="times that every system takes its turn (default 5)")
    add("--threads", type=int, default=2)
    add(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the processor's seconds of one thread, for a machine that has other work (with --threads 1)",
    )
    add(
        "--patience",
        type=int,
        default=3,
        help="how often a measurement is repeated in which a virtual machine's neighbours took over 2%% of the "
        "processors' time (default 3)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one")
    add("--turns", choices=["auto", "together", "alone"], default="auto", help="all systems loaded at once, or one")
    add("--no-steps", action="store_true", help="leave the steps out, for the sections below alone")
    add("--no-profile", action="store_true", help="leave out where the time of a step goes")
    add("--sweep", type=words, default=[], help="of members,context,sentences")
    add("--member-counts", type=numbers, default=[1, 2, 3, 4, 5])
    add("--contexts", type=numbers, default=[64, 256, 1024, 2048])
    add("--sentences", type=numbers, default=[100, 1000, 10_000])
    add("--sweep-batch", type=int, default=16, help="rows in flight for whole sets of sentences (default 16)")
    own = f"16,{DEFAULT_ROWS}"
    add("--own-batch", type=numbers, default=own, help=f"ours for --dev (default {own}, collab's default)")
    add("--dev", nargs=2, metavar=("SRC", "REF"), help="a whole set: continuous batching against static batches")
    add("--source", default="ja", help="language of SRC (default ja)")
    add("--target", default="en", help="language of REF (default en)")
    add("--limit", type=int, help="only so many sentences")
    add("--max-new-tokens", type=int, default=128, help="of a sentence (default 128)")
    add("--speculation", action="store_true", help="off and on, tokens compared")
    add("--speculate", type=words, default=SPECULATE, help=f"settings, plain first (default {','.join(SPECULATE)})")
    add("--openvino-python", type=Path, help="interpreter of an environment with optimum-intel, for the export")
    add("--work", type=Path, help="where random and converted models are kept for the next run (default: nowhere)")
    add("--quick", action="store_true", help="a tiny shape and few rounds: to see that it runs")
    add("--json", action="store_true", help="print the result as JSON")
    add("--plot", action="store_true", help="draw the results in --output instead of measuring")
    add("--output", type=Path, default=RESULTS, help="folder of the results (default decode/results)")
    options = parser.parse_args(arguments)
    options.spelled = list(sys.argv[1:] if arguments is None else arguments)
    if options.quick:
        options.steps, options.rounds, options.batch = 6, 2, [1, 2]
        options.member_counts, options.contexts, options.sentences = [1, 2], [16, 32], [4, 8]
    options.model = options.model or ["tiny" if options.quick else "smollm2-135m"]
    options.members = options.members or [3, 1]
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for given, known, name in (
        (options.systems, SYSTEMS, "--systems"),
        (options.sweep, ("members", "context", "sentences"), "--sweep"),
        (options.dtype, ("float32", "bfloat16", "float16", "int8", "auto"), "--dtype"),
        (options.peer_dtype, ("float32", "bfloat16", "float16", "int8"), "--peer-dtype"),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            raise InputError(f"{name} {unknown[0]}: expected some of {', '.join(known)}")
    if options.clock == "cpu" and options.threads != 1:
        raise InputError(f"--clock cpu counts what one thread needs: give --threads 1, not {options.threads}")
    if options.clock == "cpu":
        options.patience = 0  # what others took is not counted
    options.speculate = [check_mode(setting) for setting in options.speculate]
    if options.speculate[0] != "off":
        raise InputError(
            f"--speculate {options.speculate[0]}: the first must be off, which the others are compared with"
        )
    if options.speculation and "ours" not in options.systems:
        raise InputError("--speculation measures ours: name it among --systems")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plot:
        for picture in plot(options.output):
            print(picture)
        return 0
    print(f"measuring on {options.device}, {options.threads} threads, some minutes", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decode-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        result = measure(options, work)
    path = save(result, options.output)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    print(f"saved as {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
