"""`--explain -`: every token's explanation for a terminal, or as plain aligned text where standard output is none.

A sentence is its line number, source, translation and reference, and under them a table with a row for each token:

    token    p     by     L              S_src          S_tgt          ahead  runner-up
    went     0.55  S_src  0.12 #3 -1.20  0.80 #1 +2.10  0.61 #1 +0.90  1.80   goes 0.09

Under a member stand its own probability of the token, the token's rank with it, and its push (decode/explain.py).
"""

import io
import math
import shutil
import sys
from collections.abc import Sequence
from unicodedata import category

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from decode.engine.attribution import Explanation
from decode.explain.page import Explained
from decode.pipeline.record import Record
from decode.pipeline.output import OrderedWriter

# Kinds of characters that would not be seen, or would move the cursor: shown as escapes.
UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
# Of the members in their order, as terminals have them.
COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_blue", "bright_green")


class TextWriter(OrderedWriter):
    """A context; `put_sentence` takes each line once, in any order. Where standard output is a terminal, in colours."""

    def __init__(self, explained: Explained) -> None:
        super().__init__("-")
        self.explained = explained

    def put_sentence(self, line: int, source: str, record: Record | None) -> None:
        """record: None for a line that is blank or was skipped."""
        if record is None:
            self.put(line, "", translated=False)
        elif sys.stdout.isatty():
            self.put(line, in_colours(self.explained, line, source, record))
        else:
            self.put(line, plain(self.explained, line, source, record))


def plain(explained: Explained, line: int, source: str, record: Record) -> str:
    """The sentence as lines of text, columns aligned; ends with an empty line."""
    rows = [_columns(explained), *(_cells(explained, explanation) for explanation in _explanations(record))]
    widths = [max(map(cell_len, column)) for column in zip(*rows)]
    table = ["  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([*_head(explained, line, source, record), *(f"    {row}".rstrip() for row in table), ""])


def in_colours(explained: Explained, line: int, source: str, record: Record) -> str:
    """The same for a terminal: the decider's colour on the token, the runner-up dimmed."""
    names = list(explained.weights)
    colour = dict(zip(names, COLOURS))
    number, *others = _head(explained, line, source, record)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in _columns(explained):
        table.add_column(column, header_style=f"bold {colour.get(column, 'default')}", overflow="fold")
    for explanation in _explanations(record):
        cells = [Text(cell) for cell in _cells(explained, explanation)]
        decider = "default" if explanation.decider is None else colour[names[explanation.decider]]
        cells[0].stylize(f"bold {decider}")
        cells[2].stylize(decider)
        for member in explanation.overruled(list(explained.weights.values())):
            cells[3 + member].stylize("bold")
        cells[-1].stylize("dim")
        table.add_row(*cells)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=shutil.get_terminal_size().columns, highlight=False)
    console.print(Text(number, style="bold"))
    for other in others:
        console.print(Text(other))
    console.print(table)
    return text.getvalue()


def _explanations(record: Record) -> list[Explanation]:
    return [Explanation(*fields) for fields in record.explanations]


def _head(explained: Explained, line: int, source: str, record: Record) -> list[str]:
    number = str(line + 1)
    reference = explained.reference(line)
    indent = " " * (len(number) + 2)
    return [
        f"{number}  {_safe(source)}",
        f"{indent}{_safe(record.text)}",
        *([] if reference is None else [f"{indent}reference: {_safe(reference)}"]),
    ]


def _columns(explained: Explained) -> list[str]:
    return ["token", "p", "by", *explained.weights, "ahead", "runner-up"]


def _cells(explained: Explained, explanation: Explanation) -> list[str]:
    names = list(explained.weights)
    decider = explained.other_decider if explanation.decider is None else names[explanation.decider]
    pushes: Sequence[float | None] = explanation.pushes or [None] * len(names)
    members = [
        f"{_probability(logprob)} #{rank}" + ("" if push is None else f" {push:+.2f}")
        for logprob, rank, push in zip(explanation.logprobs, explanation.ranks, pushes)
    ]
    ahead = runner_up = ""
    if explanation.runner_up is not None and explanation.runner_up_logprob is not None:
        ahead = f"{explanation.margin:.2f}"
        runner_up = f"{_visible(explained, explanation.runner_up)} {_probability(explanation.runner_up_logprob)}"
    token = _visible(explained, explanation.token)
    return [token, _probability(explanation.logprob), decider, *members, ahead, runner_up]


def _visible(explained: Explained, token: int) -> str:
    """Without the space before a word."""
    return _safe(explained.piece(token).removeprefix(" ")) or "␣"


def _safe(text: str) -> str:
    return "".join(c.encode("unicode_escape").decode() if category(c) in UNSEEN else c for c in text)


def _probability(logprob: float) -> str:
    value = math.exp(logprob)
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
