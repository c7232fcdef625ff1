"""`python -m eval.paper STUDY.toml`: every table of the paper from nothing, measured, beside the printed figures.

Text, pre-training, fine-tuning, fits, translations, scores, report: a graph of steps (eval/steps.py) of which each is
done once (eval/graph.py). The same command goes on after an interruption, and does again only what a change of the
study's file, its text or its models makes different.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.graph import Store, in_order
from eval.plan import show
from eval.results import gather
from eval.runner import Runner
from eval.steps import Steps
from eval.study import read_study
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

EXAMPLES = """examples:
  python -m eval.paper eval/paper.toml --dry-run                  # the plan: steps, GPU hours, memory
  python -m eval.paper eval/paper.toml --devices 0,1,2,3          # the paper on four GPUs
  python -m eval.paper eval/small.toml --data DATA                # all tables with small models, on a laptop

exit codes: 0 done, 2 bad arguments or input, 130 interrupted (the same command goes on), 1 a fault
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.paper",
        description="Run a study: train experts, decode every expression, score, write the tables.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("study", metavar="STUDY.toml", help="what is trained, decoded and compared")
    add("--data", metavar="DIR", default=".", help="folder of the files that the study's parts name (default: here)")
    add("--work", metavar="DIR", help="where steps and results go (default: runs/ and the study's name)")
    add("--dry-run", action="store_true", help="print the plan and end")
    add("--steps", action="store_true", help="with --dry-run: every step with its key and whether it is done")
    add("--jobs", type=int, metavar="N", help="steps side by side (default: the study's)")
    add("--threads", type=int, metavar="N", help="threads of a step (default: the study's)")
    add("--devices", metavar="LIST", help="GPUs by number, such as 0,1: one step on each (default: the study's)")
    arguments = parser.parse_args(argv)
    config = Path(arguments.study)
    study = read_study(config)
    changed = {
        name: value
        for name, value in (
            ("jobs", arguments.jobs),
            ("threads", arguments.threads),
            ("devices", arguments.devices and arguments.devices.split(",")),
        )
        if value is not None
    }
    study = replace(study, run=replace(study.run, **changed))
    if study.run.jobs < 1 or study.run.threads < 0:
        raise InputError("--jobs must be at least 1, --threads at least 0")
    steps = Steps(study, Path(arguments.data), config.parent)
    store = Store(Path(arguments.work or Path("runs") / config.stem))
    order = in_order(steps.wanted())
    plan = show(steps, order, store, arguments.steps)
    if arguments.dry_run:
        print("\n".join(plan))
        return 0
    print("\n".join(plan), file=sys.stderr)
    store.work.mkdir(parents=True, exist_ok=True)
    runner = Runner(store, study.run)
    sittings = Sittings(store.work / "sittings.json")
    try:
        runner.run(order, sittings.note)
    finally:
        sittings.note()
    results = store.work / "results.json"
    found = gather(steps, store, config, sittings.seconds)
    atomic_write(results, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    from eval.report import write

    write(results, store.work / "report")
    print(f"{results}; tables in {store.work / 'report'}", file=sys.stderr)
    return 0


class Sittings:
    """When each run of the study began and when it last ended a step, so that the time of all together is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before: list[list[float]] = json.loads(path.read_text()) if path.exists() else []
        self.began = time.time()

    def note(self) -> None:
        atomic_write(self.path, json.dumps([*self.before, [self.began, time.time()]]) + "\n")

    @property
    def seconds(self) -> float:
        return float(sum(end - began for began, end in json.loads(self.path.read_text())))


if __name__ == "__main__":
    sys.exit(exit_code(main))
