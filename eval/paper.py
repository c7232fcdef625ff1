"""`python -m eval.paper STUDY.toml`: every table of the paper, measured from scratch, beside the paper's figures.

A study is a graph of steps (eval/study/steps.py): text, pre-training, fine-tuning, fits, translations, scores. Each
runs once (eval/study/graph.py). After an interruption the same command resumes, and after a change of the study's file,
its text or its models it runs only the steps that depend on the change. The report comes last (eval/report.py).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.report import write
from eval.study.config import read_study
from eval.study.graph import Store, in_order
from eval.study.plan import plan_lines
from eval.study.results import gather
from eval.study.runner import Runner
from eval.study.steps import Steps
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

EXAMPLES = """examples:
  python -m eval.paper eval/paper.toml --dry-run --gpu-memory 80  # the plan: steps and predicted memory
  python -m eval.paper eval/paper.toml --devices 0,1,2,3          # the paper on four GPUs
  python -m eval.paper eval/small.toml --data DATA                # all tables with small models, on a laptop

exit codes: 0 done, 2 bad arguments or input, 130 interrupted (the same command resumes), 1 failure
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.paper",
        description="Run a study: train experts, decode every expression, score, write the tables.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("study", metavar="STUDY.toml", help="what is trained, decoded and compared")
    add("--data", metavar="DIR", default=".", help="folder of the files that the study names (default: this folder)")
    add("--work", metavar="DIR", help="folder of steps and results (default: runs/ and the study's name)")
    add("--dry-run", action="store_true", help="print the plan with predicted memory and exit")
    add("--gpu-memory", type=float, metavar="GIB", help="of one device: the plan shows which steps fit")
    add("--steps", action="store_true", help="with --dry-run: every step with its key and whether it is done")
    add("--jobs", type=int, metavar="N", help="steps that run in parallel (default: the study's)")
    add("--threads", type=int, metavar="N", help="threads of a step (default: the study's)")
    add("--devices", metavar="LIST", help="GPUs by number, such as 0,1: one step on each (default: the study's)")
    arguments = parser.parse_args(argv)
    config = Path(arguments.study)
    study = read_study(config)
    devices = arguments.devices and arguments.devices.split(",")
    changed = {"jobs": arguments.jobs, "threads": arguments.threads, "devices": devices}
    study = replace(study, run=replace(study.run, **{key: new for key, new in changed.items() if new is not None}))
    if study.run.jobs < 1 or study.run.threads < 0:
        raise InputError("--jobs must be at least 1, --threads at least 0")
    if arguments.gpu_memory is not None and not arguments.gpu_memory > 0:
        raise InputError(f"--gpu-memory {arguments.gpu_memory:g}: must be above 0")
    steps = Steps(study, Path(arguments.data), config.parent)
    store = Store(Path(arguments.work or Path("runs") / config.stem))
    order = in_order(steps.targets())
    plan = plan_lines(steps, order, store, arguments.gpu_memory, arguments.steps)
    print("\n".join(plan), file=sys.stdout if arguments.dry_run else sys.stderr)
    if arguments.dry_run:
        return 0
    store.work.mkdir(parents=True, exist_ok=True)
    Runner(store, study.run).run(order)
    results = store.work / "results.json"
    gathered = gather(steps, store, config)
    atomic_write(results, json.dumps(gathered, indent=1, ensure_ascii=False) + "\n")
    write(results, store.work / "report")
    print(f"{results}; tables in {store.work / 'report'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
