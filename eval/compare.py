"""Scores of several translations of one text, with p-values against some of them, as one JSON file.

    python -m eval.compare --reference ref.txt --target en --system collab=a.txt --system proxy=b.txt \\
        --against proxy --output scores.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpora import read_lines
from eval.score import add_score_options, score, score_options
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write


def compare_all(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    metrics: Sequence[str],
    against: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """Score all systems, and compare each with those named in `against`; `options` are those of `eval.score.score`.

    Returns `sentences` and `systems`: for each name `metrics` (rows of key, label, score, signature) and `p`, p-values
    by the other's name and the metric's key. Raises InputError as `score` does.
    """
    found: dict[str, Any] = {}
    for name in against or list(systems)[:1]:
        others = {other: lines for other, lines in systems.items() if other != name}
        report = score(systems[name], references, metrics, baselines=others, **options)
        found.setdefault(name, {"metrics": report["metrics"], "p": {}})
        for other in report.get("baselines", []):
            rows = [{**row, "score": theirs["score"]} for row, theirs in zip(report["metrics"], other["metrics"])]
            entry = found.setdefault(other["name"], {"metrics": rows, "p": {}})
            if against:
                entry["p"][name] = {row["key"]: row["p_value"] for row in other["metrics"]}
    return {"sentences": len(references), "systems": {name: found[name] for name in systems}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.compare", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--system", action="append", required=True, metavar="NAME=FILE", help="translations, one per line; repeatable")
    add("--against", action="append", default=[], metavar="NAME", help="compare all others with it; repeatable")
    add("--output", required=True, metavar="FILE", help="scores as JSON")
    add_score_options(parser)
    arguments = parser.parse_args(argv)
    files = {}
    for word in arguments.system:
        name, equals, path = word.partition("=")
        if not equals or name in files:
            raise InputError(f"--system {word}: expected NAME=FILE, each name once")
        files[name] = path
    for name in arguments.against:
        if name not in files:
            raise InputError(f"--against {name}: no such system; known are {', '.join(files)}")
    systems = {name: read_lines(path) for name, path in files.items()}
    references, metrics = read_lines(arguments.reference), arguments.metrics.split(",")
    result = compare_all(systems, references, metrics, arguments.against, **score_options(arguments))
    atomic_write(Path(arguments.output), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
