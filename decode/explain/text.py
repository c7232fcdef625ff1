"""`--explain -`: the explanation of every token for a terminal, or as plain aligned text where output is not one.

A sentence is its line number, source, translation and reference, and below them a table with a row for each token:

    token    p     decider  L              S_src          S_tgt          margin  runner-up
    went     0.55  S_src    0.12 #3 -1.20  0.80 #1 +2.10  0.61 #1 +0.90  1.80    goes 0.09

Under a member stand its own probability of the token, the token's rank by it, and its contribution to the margin
(decode/engine/attribution.py).
"""

import io
import math
import shutil
import sys
from unicodedata import category

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from decode.engine.attribution import Explanation
from decode.explain.page import ExplainedRun
from decode.pipeline.journal import Record
from decode.pipeline.output import OrderedWriter

# Unicode categories of characters that are invisible or move the cursor: shown as escapes.
INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
# Of the members, in order.
COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_blue", "bright_green")


class TextWriter(OrderedWriter):
    """A context manager; `put_sentence` once for each line, in any order. In colours where output is a terminal."""

    def __init__(self, run: ExplainedRun) -> None:
        super().__init__("-")
        self.run = run

    def format(self, line: int, source: str, record: Record | None) -> str:
        if record is None:
            return ""
        return (in_colours if sys.stdout.isatty() else plain)(self.run, line, source, record)


def plain(run: ExplainedRun, line: int, source: str, record: Record) -> str:
    """The sentence as lines of text, columns aligned; ends with an empty line."""
    rows = [_columns(run), *(_cells(run, Explanation(*fields)) for fields in record.explanations)]
    widths = [max(map(cell_len, column)) for column in zip(*rows)]
    table = ["  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([*_head(run, line, source, record), *(f"    {row}".rstrip() for row in table), ""])


def in_colours(run: ExplainedRun, line: int, source: str, record: Record) -> str:
    """The same for a terminal: the token in the colour of the deciding member, the runner-up dimmed."""
    names, weights = list(run.weights), list(run.weights.values())
    colour = dict(zip(names, COLOURS))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in _columns(run):
        table.add_column(column, header_style=f"bold {colour.get(column, 'default')}", overflow="fold")
    for fields in record.explanations:
        explanation = Explanation(*fields)
        cells = [Text(cell) for cell in _cells(run, explanation)]
        decider = "default" if explanation.decider is None else colour[names[explanation.decider]]
        cells[0].stylize(f"bold {decider}")
        cells[2].stylize(decider)
        for member in explanation.overruled(weights):
            cells[3 + member].stylize("bold")
        cells[-1].stylize("dim")
        table.add_row(*cells)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=shutil.get_terminal_size().columns, highlight=False)
    number, *others = _head(run, line, source, record)
    console.print(Text(number, style="bold"), *map(Text, others), table, sep="\n")
    return text.getvalue()


def _head(run: ExplainedRun, line: int, source: str, record: Record) -> list[str]:
    number, reference = str(line + 1), run.reference(line)
    indent = " " * (len(number) + 2)
    lines = [f"{number}  {_safe(source)}", f"{indent}{_safe(record.text)}"]
    return lines if reference is None else [*lines, f"{indent}reference: {_safe(reference)}"]


def _columns(run: ExplainedRun) -> list[str]:
    return ["token", "p", "decider", *run.weights, "margin", "runner-up"]


def _cells(run: ExplainedRun, explanation: Explanation) -> list[str]:
    names = list(run.weights)
    decider = run.other_decider if explanation.decider is None else names[explanation.decider]
    members = []
    for n, (logprob, rank) in enumerate(zip(explanation.logprobs, explanation.ranks)):
        contribution = f" {explanation.pushes[n]:+.2f}" if explanation.pushes else ""
        members.append("–" if logprob is None else f"{_probability(logprob)} #{rank}{contribution}")
    margin = runner_up = ""
    if explanation.runner_up is not None and explanation.runner_up_logprob is not None:
        margin = f"{explanation.margin:.2f}"
        runner_up = f"{_visible(run, explanation.runner_up)} {_probability(explanation.runner_up_logprob)}"
    token = _visible(run, explanation.token)
    return [token, _probability(explanation.logprob), decider, *members, margin, runner_up]


def _visible(run: ExplainedRun, token: int) -> str:
    """Without the space before a word."""
    return _safe(run.piece(token).removeprefix(" ")) or "␣"


def _safe(text: str) -> str:
    return "".join(c.encode("unicode_escape").decode() if category(c) in INVISIBLE else c for c in text)


def _probability(logprob: float) -> str:
    value = math.exp(logprob)
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
