"""A study's report: `python -m eval.report results.json --output FOLDER [--format md,tex]`.

Tables 2, 3, 4 and 6 in the paper's arrangement, every score with its signature, the fitted weights, and a plot, from
the results.json of `eval.paper` and the texts beside it, as Markdown and as LaTeX.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from eval.report_data import Results, load
from eval.report_plots import bleu_by_expression
from eval.report_tables import fit_table, paper_tables, score_table, signature_table
from eval.tables import Latex, Markdown, Table, code
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

WRITERS: dict[str, Markdown | Latex] = {"md": Markdown(), "tex": Latex()}
PLOT = "plots/bleu-by-expression.png"
EXAMPLES = """examples:
  python -m eval.report runs/small/results.json --output runs/small/report
  python -m eval.report runs/paper/results.json --output tables --format tex
"""


def write(results_file: Path | str, folder: Path | str, formats: Sequence[str] = tuple(WRITERS)) -> list[Path]:
    """Write report.md, report.tex and the plot into `folder`; returns the files.

    Texts are read from the folder of results.json. Without them there is no Table 3, and without matplotlib no plot.
    Raises InputError for an unknown format, a file that is no results.json, a folder that cannot be written.
    """
    unknown = [name for name in formats if name not in WRITERS]
    if unknown:
        raise InputError(f"unknown format {unknown[0]!r}, expected some of {','.join(WRITERS)}")
    results, folder = load(Path(results_file)), Path(folder)
    plots: dict[Path, bytes] = {}
    try:
        plots[folder / PLOT] = bleu_by_expression(results)
    except ImportError:
        print("no plot: it needs pip install 'collab-mt[plot]'", file=sys.stderr)
    reports = {folder / f"report.{name}": render(results, WRITERS[name], bool(plots)) for name in formats}
    try:
        (folder / PLOT).parent.mkdir(parents=True, exist_ok=True)
        for path, png in plots.items():
            path.write_bytes(png)
        for path, text in reports.items():
            atomic_write(path, text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); expected a folder") from None
    return [*reports, *plots]


def render(results: Results, writer: Markdown | Latex, with_plot: bool) -> str:
    """The whole report; the plot is PLOT, below the report's folder."""

    def tables(*found: Table) -> list[str]:
        return [writer.table(table) for table in found if table.rows]

    data = results.data
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    where = f"{data['machine']}, {data['date']}, {data['seconds'] / 60:,.0f} min of steps, commit {data['commit']}"
    sections = {
        "The paper's tables": tables(*paper_tables(results)),
        "Plot": [writer.picture(PLOT)] if with_plot else [],
        "Fitted weights": tables(fit_table(results)),
        "Every row and measure": tables(
            *(score_table(results, direction) for direction in results.directions), signature_table(results)
        ),
    }
    blocks = [writer.text((f"{where}; {versions}; ", code(f"python -m eval.paper {data['config']}")))]
    for title, parts in sections.items():
        blocks += [writer.heading(title), *parts] if parts else []
    return writer.document(data["title"], blocks)


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
