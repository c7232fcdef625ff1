"""What `--explain` costs: whole runs with and without it, in turns, on the machine at hand.

    python -m decode.explain_bench --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt \\
        --source ja --target en --input dev.ja

A run is all that decode.collab does for a file once weights are loaded: steps, journal, output, and the page. The
ratio is taken within each round, so what else the machine does meets both alike. `--clock cpu` counts the processor's
seconds of one thread instead, for a machine that has other work. One JSON file a run, in decode/results/explain/.
"""

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from corpora import read_lines
from corpora.text import display_name
from decode.explain.page import Explained, PageWriter
from decode.engine.expression import spell
from decode.pipeline.journal import journal_path
from decode.pipeline.members import Options, encode_sentences, load_ensemble, open_readers
from decode.options import add_model_options, named_folders
from decode.pipeline.placement import per_member, places
from decode.pipeline.distributed import Ranks
from decode.pipeline.results import Results
from decode.pipeline.session import Session
from decode.pipeline.weights_file import combination
from decode.pipeline.work import Work
from benchmarks.common import machine_name as device_name
from benchmarks.common import save
from minillama.machine import versions
from minillama import InputError
from minillama.cli import Parser
from minillama.errors import exit_code

RESULTS = Path(__file__).parent / "results" / "explain"


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="python -m decode.explain_bench", description="What --explain costs in time.")
    add_model_options(result)
    add = result.add_argument
    add("--input", required=True, metavar="FILE", help="a sentence a line")
    add("--batch-size", type=int, default=16, metavar="N")
    add("--rounds", type=int, default=5, help="runs of each kind (default 5)")
    add("--threads", type=int, default=2)
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the processor's seconds, with --threads 1")
    add("--output", type=Path, default=RESULTS, help="folder of the results (default decode/results/explain)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise InputError(f"--clock cpu counts what one thread needs: give --threads 1, not {arguments.threads}")
    if min(arguments.rounds, arguments.batch_size, arguments.threads) < 1:
        raise InputError("--rounds, --batch-size and --threads must be at least 1")
    torch.set_num_threads(arguments.threads)
    folders = named_folders(arguments.model)
    weights = combination(arguments, list(folders))
    where = places(arguments.device, arguments.dtype, list(folders), arguments.batch_size)
    prompts = per_member(arguments.prompt, list(folders), "--prompt")
    chats = per_member(arguments.chat, list(folders), "--chat")
    readers = open_readers({name: folders[name] for name in weights}, prompts, chats)
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size)
    prepared = encode_sentences(read_lines(arguments.input), readers, options, arguments.input)
    ensemble, _ = load_ensemble(readers, weights, where)
    pieces = readers[0].tokenizer.pieces()
    now = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def run(explain: bool, folder: Path) -> float:
        asked = replace(options, explain=explain)
        output, page = folder / "hyp.txt", folder / "report.html"
        session = Session(ensemble, readers, asked)
        work = Work.plan(prepared, Ranks(), journal_path(str(output)), {}, False)
        started = now()
        writer = PageWriter(str(page), Explained(weights, asked, pieces)) if explain else None
        with Results(str(output), None, None, prepared.count, False, writer) as results:
            results.sentences = prepared
            work.translate(session, results, time.perf_counter())
        seconds = now() - started
        assert work.part is not None
        work.part.close()
        return seconds

    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "device": device_name(),
        "threads": arguments.threads,
        "clock": arguments.clock,
        "versions": versions(),
        "combine": spell(weights),
        "input": display_name(arguments.input).rsplit("/", 1)[-1],
        "batch_size": arguments.batch_size,
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(-1, arguments.rounds):  # the first round warms up
            for explain in (False, True):
                taken = run(explain, folder)
                if number >= 0:
                    seconds[explain].append(taken)
            if number >= 0:
                print(f"round {number + 1}: plain {seconds[False][-1]:.2f} s, explained {seconds[True][-1]:.2f} s")
        result["sentences"] = prepared.count
        result["page_bytes"] = (folder / "report.html").stat().st_size
        result["output_bytes"] = (folder / "hyp.txt").stat().st_size
    ratios = [explained / plain for plain, explained in zip(seconds[False], seconds[True])]
    result |= {
        "plain_seconds": [round(value, 4) for value in seconds[False]],
        "explained_seconds": [round(value, 4) for value in seconds[True]],
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_of_least": round(min(seconds[True]) / min(seconds[False]), 4),
        "overhead_median": round(statistics.median(ratios) - 1, 4),
        "overhead_of_least": round(min(seconds[True]) / min(seconds[False]) - 1, 4),
    }
    print(
        f"explained over plain: {result['ratio_median']:.3f} (median of {arguments.rounds} rounds), "
        f"{result['ratio_of_least']:.3f} (least of each); the page has {result['page_bytes'] / 1e6:.2f} MB"
    )
    print(f"written: {save(result, arguments.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
