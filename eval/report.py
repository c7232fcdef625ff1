"""A study's report: `python -m eval.report results.json --output FOLDER [--format md,tex,html]`.

Tables 2, 3, 4 and 6 in the paper's arrangement, everything else that was measured, and plots, from the results.json of
`eval.paper` and the texts beside it: Markdown, LaTeX and one HTML page with everything in it. `write` is the same from
Python. The tables are data (eval.report_tables), rendered by eval.render and eval.render_html.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eval.document import Document, Inline, Paragraph, Picture, code
from eval.render import latex, markdown
from eval.render_html import html
from eval.report_input import Study, load
from eval.report_plots import Plot, draw_plots
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
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

FORMATS: dict[str, Callable[[Document], str]] = {"md": markdown, "tex": latex, "html": html}
PLOTS = "plots"
EXAMPLES = """examples:
  python -m eval.report runs/small/results.json --output runs/small/report
  python -m eval.report runs/paper/results.json --output tables --format tex
"""


def write(results: Path | str, folder: Path | str, formats: Sequence[str] = tuple(FORMATS)) -> list[Path]:
    """Write report.md, report.tex, report.html and the plots into `folder`; returns the files.

    results: the results.json of a study; texts are read from the folder it lies in, and parts whose texts are not there
    are left out. Plots need matplotlib; without it the report says so and has none.
    Raises InputError for an unknown format, a file that is no results.json, a folder that cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"unknown format {unknown[0] if unknown else ''!r}, expected some of {','.join(FORMATS)}")
    study = load(Path(results))
    plots, folder = _plots(study), Path(folder)
    document = build(study, plots)
    texts = {folder / f"report.{name}": FORMATS[name](document) for name in formats}
    if plots:
        texts |= {folder / PLOTS / f"{plot.name}.svg": plot.svg for plot in plots}
    pictures = {folder / PLOTS / f"{plot.name}.png": plot.png for plot in plots or []}
    try:
        (folder / PLOTS if plots else folder).mkdir(parents=True, exist_ok=True)
        for path, content in pictures.items():
            path.write_bytes(content)
        for path, text in texts.items():
            atomic_write(path, text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); expected a folder") from None
    return [*texts, *pictures]


def build(study: Study, plots: Sequence[Plot] | None = ()) -> Document:
    """The report as data. plots: None where matplotlib is missing."""
    document = Document(study.data["title"])
    document.add(*(Paragraph(text) for text in origin(study)), direction_table(study))
    document.section("The paper's tables", [*paper_tables(study), table_3(study)])
    pictures = [Picture(Path(PLOTS, f"{plot.name}.png"), plot.svg, plot.description) for plot in plots or []]
    document.section("Plots", pictures)
    if plots is None:
        document.add(Paragraph(("There are no plots: they need ", code("pip install 'collab-mt[plot]'"), ".")))
    document.section("Fitted weights", [fit_table(study), likelihood_table(study)])
    scores = [score_table(study, direction) for direction in study.directions]
    document.section("Every row and measure", [*scores, signature_table(study)])
    document.section("Speed and memory", [speed_table(study)])
    document.section("Where the systems differ most", differing_sentences(study))
    document.section("How it was made", [settings_table(study), step_table(study)])
    return document


def origin(study: Study) -> list[Inline]:
    """Where and how the study ran, in a few sentences."""
    data = study.data
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


def _plots(study: Study) -> list[Plot] | None:
    try:
        return draw_plots(study)
    except ImportError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.report",
        description="A study's tables and plots as Markdown, LaTeX and one HTML page.",
        epilog=EXAMPLES,
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what eval.paper wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--format", default=",".join(FORMATS), metavar="LIST", help=f"of {','.join(FORMATS)}")
    arguments = parser.parse_args(argv)
    for path in write(arguments.results, arguments.output, [part.strip() for part in arguments.format.split(",")]):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
