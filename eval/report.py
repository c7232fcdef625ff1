"""A study's report: `python -m eval.report results.json --output FOLDER [--format md,tex]`.

Tables 2, 3, 4 and 6 in the paper's arrangement, everything else that was measured, and a plot, from the results.json of
`eval.paper` and the texts beside it, as Markdown and as LaTeX.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.report_data import Results, load
from eval.report_plots import bleu_by_expression
from eval.report_sentences import differing_sentences, table_3
from eval.report_tables import (
    direction_table,
    fit_table,
    likelihood_table,
    paper_tables,
    score_table,
    settings_table,
    signature_table,
    speed_table,
    step_table,
)
from eval.tables import Inline, Latex, Markdown, Table, code
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

WRITERS: dict[str, Markdown | Latex] = {"md": Markdown(), "tex": Latex()}
PLOT = Path("plots", "bleu-by-expression.png")
EXAMPLES = """examples:
  python -m eval.report runs/small/results.json --output runs/small/report
  python -m eval.report runs/paper/results.json --output tables --format tex
"""


def write(results_file: Path | str, folder: Path | str, formats: Sequence[str] = tuple(WRITERS)) -> list[Path]:
    """Write report.md, report.tex and the plot into `folder`; returns the files.

    Texts are read from the folder of results.json; a part whose texts are not there is left out. The plot needs
    matplotlib; without it the report names the package to install.
    Raises InputError for an unknown format, a file that is no results.json, a folder that cannot be written.
    """
    unknown = [name for name in formats if name not in WRITERS]
    if unknown or not formats:
        raise InputError(f"unknown format {unknown[0] if unknown else ''!r}, expected some of {','.join(WRITERS)}")
    results, folder = load(Path(results_file)), Path(folder)
    plots: dict[Path, bytes] | None
    try:
        png = bleu_by_expression(results)
        plots = {PLOT: png} if png else {}
    except ImportError:
        plots = None
    texts = {folder / f"report.{name}": render(results, WRITERS[name], plots) for name in formats}
    pictures = {folder / path: png for path, png in (plots or {}).items()}
    try:
        for path in (*texts, *pictures):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, png in pictures.items():
            path.write_bytes(png)
        for path, text in texts.items():
            atomic_write(path, text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); expected a folder") from None
    return [*texts, *pictures]


def render(results: Results, writer: Markdown | Latex, plots: Iterable[Path] | None) -> str:
    """The whole report. plots: paths below the report's folder, None where matplotlib is missing."""

    def tables(*found: Table | None) -> list[str]:
        return [writer.table(table) for table in found if table is not None and table.rows]

    if plots is None:
        pictures = [writer.text(("There is no plot: it needs ", code("pip install 'collab-mt[plot]'"), "."))]
    else:
        description = "BLEU by expression, directions side by side"
        pictures = [writer.picture(path.as_posix(), description) for path in plots]
    scores = [score_table(results, direction) for direction in results.directions]
    sections = {
        "The paper's tables": tables(*paper_tables(results), table_3(results)),
        "Plots": pictures,
        "Fitted weights": tables(fit_table(results), likelihood_table(results)),
        "Every row and measure": tables(*scores, signature_table(results)),
        "Speed and memory": tables(speed_table(results)),
        "Where the systems differ most": tables(*differing_sentences(results)),
        "How it was made": tables(settings_table(results), step_table(results)),
    }
    blocks = [*map(writer.text, origin(results)), *tables(direction_table(results))]
    for title, parts in sections.items():
        blocks += [writer.heading(title), *parts] if parts else []
    return writer.document(results.data["title"], blocks)


def origin(results: Results) -> list[Inline]:
    """Where and how the study ran, in a few sentences."""
    data = results.data
    where: list[str] = []
    if data.get("machine"):
        where.append(f"Measured on {data['machine']}")
    if data.get("date"):
        where.append(str(data["date"]))
    if data.get("seconds") is not None:
        where.append(f"{_duration(data['seconds'])} for all steps")
    lines: list[Inline] = [", ".join(where) + "."] if where else []
    if data.get("config"):
        commit = f" at commit {data['commit']}" if data.get("commit") else ""
        lines.append(("Again: ", code(f"python -m eval.paper {data['config']}"), f"{commit}."))
    if data.get("versions"):
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()) + ".")
    return lines


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.report",
        description="A study's tables and plot as Markdown and LaTeX.",
        epilog=EXAMPLES,
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what eval.paper wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--format", default=",".join(WRITERS), metavar="LIST", help=f"of {','.join(WRITERS)}")
    arguments = parser.parse_args(argv)
    for path in write(arguments.results, arguments.output, [name.strip() for name in arguments.format.split(",")]):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
