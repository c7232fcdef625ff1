"""Tables and short texts, as Markdown and as LaTeX.

All text is plain: nothing in it is markup, whatever a model has written. The LaTeX is for `\\input` into a document
that uses LATEX_PACKAGES and, for Japanese, a font with its characters (XeLaTeX, LuaLaTeX).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Literal

MISSING = "–"
# What GitHub's Markdown reads as markup inside a line; an underscore between letters is none.
MARKDOWN_MARKUP = re.compile(r"[\\`*|\[$]|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|&(?=[#\w])|~(?=~)")
LATEX_PACKAGES = r"\usepackage{adjustbox,booktabs,caption,float,graphicx,textcomp}"
LATEX_TEXT = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
LATEX_MATH = {"±": r"\pm", "×": r"\times", "−": "-", "≤": r"\leq", "≥": r"\geq", "→": r"\rightarrow"}
LATEX_SPECIAL = {
    **{character: f"\\{character}" for character in "#$%&_{}"},
    **{character: rf"\text{name}{{}}" for character, name in LATEX_TEXT.items()},
    **{character: rf"\ensuremath{{{name}}}" for character, name in LATEX_MATH.items()},
    # Quotes and hyphens as they are typed, without ligatures.
    **{'"': r"\textquotedbl{}", "'": "{'}", "`": r"{\textasciigrave}", "-": "{-}", "\u00ad": r"\-"},
    **{"†": r"\textdagger{}", "‡": r"\textdaggerdbl{}"},
}
LONG_SHARE = 0.75  # of the line's width, for all columns of long text together


@dataclass(frozen=True)
class Span:
    text: str
    kind: Literal["plain", "code", "strong"] = "plain"


def code(text: str) -> Span:
    return Span(text, "code")


def strong(text: str) -> Span:
    return Span(text, "strong")


Inline = str | Span | tuple[str | Span, ...]


@dataclass(frozen=True, eq=False)  # a table may have two columns of one label
class Column:
    """`group` stands above neighbouring columns of the same group. kind: text, number, or long text that wraps."""

    label: str
    kind: Literal["text", "number", "long"] = "text"
    group: str = ""


Row = Mapping[Column, Inline]


@dataclass(frozen=True)
class Table:
    """Blocks of rows, separated by a line. `name` is its label in LaTeX.

    The first row's columns are the table's; every other row has as many cells, or ValueError is raised.
    """

    name: str
    title: str
    blocks: Sequence[Sequence[Row]]
    notes: Sequence[Inline] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: a row of {len(row)} cells under {len(self.columns)} columns")

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block]

    @property
    def columns(self) -> list[Column]:
        return list(self.rows[0])

    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of one group as (name, how many); empty if no column has a group."""
        runs = groupby(self.columns, key=lambda column: column.group)
        groups = [(name, len(list(columns))) for name, columns in runs]
        return groups if any(name for name, _ in groups) else []

    def without_empty_columns(self) -> "Table":
        """The table without columns whose cells are all MISSING."""
        cells = zip(*(row.values() for row in self.rows))
        full = [any(cell != MISSING for cell in column) for column in cells]
        blocks = [[dict(compress(row.items(), full)) for row in block] for block in self.blocks]
        return replace(self, blocks=blocks)


def number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    """A number as it is printed, `MISSING` where there is none; a minus is U+2212."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    if not any(digit in text for digit in "123456789"):  # no sign on what rounds to zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


class Markdown:
    """GitHub's Markdown. It has one line of heads, so the name of a group stands in each of its columns."""

    def document(self, title: str, blocks: Sequence[str]) -> str:
        return "\n\n".join([f"# {self.escape(title)}", *blocks]) + "\n"

    def heading(self, text: str) -> str:
        return f"## {self.escape(text)}"

    def picture(self, path: str, description: str) -> str:
        return f"![{self.escape(description)}]({path})"

    def table(self, table: Table) -> str:
        """Title, table, notes."""
        title = [f"**{self.escape(table.title)}**"] if table.title else []
        return "\n\n".join([*title, self.cells(table), *map(self.text, table.notes)])

    def cells(self, table: Table) -> str:
        """The table alone."""
        heads = [self.escape(f"{column.group} {column.label}".strip()) for column in table.columns]
        rules = "|".join("---:" if column.kind == "number" else "---" for column in table.columns)
        rows = [f"| {' | '.join(map(self.text, row.values()))} |" for row in table.rows]
        return "\n".join([f"| {' | '.join(heads)} |", f"|{rules}|", *rows])

    def text(self, inline: Inline) -> str:
        return "".join(map(self._span, _spans(inline)))

    def escape(self, text: str) -> str:
        return MARKDOWN_MARKUP.sub(r"\\\g<0>", _one_line(text))

    def _span(self, span: Span) -> str:
        if span.kind == "code":
            fence = "``" if "`" in span.text else "`"
            return fence + _one_line(span.text).replace("|", r"\|") + fence
        text = self.escape(span.text)
        return f"**{text}**" if span.kind == "strong" else text


class Latex:
    """Sections, paragraphs, figures, and booktabs tables with a rule below each group, no wider than the line."""

    def document(self, title: str, blocks: Sequence[str]) -> str:
        return "\n\n".join([f"% {_one_line(title)}; needs {LATEX_PACKAGES}", *blocks]) + "\n"

    def heading(self, text: str) -> str:
        return rf"\section*{{{self.escape(text)}}}"

    def picture(self, path: str, description: str) -> str:
        size = r"width=0.8\linewidth,height=0.75\textheight,keepaspectratio"
        graphics = rf"\includegraphics[{size}]{{{path}}}"
        return f"\\begin{{figure}}[H]\\centering\n{graphics}\n\\caption{{{self.escape(description)}}}\n\\end{{figure}}"

    def table(self, table: Table) -> str:
        """Title, table, notes."""
        width = LONG_SHARE / max(1, sum(column.kind == "long" for column in table.columns))
        kinds = {"text": "l", "number": "r", "long": rf"p{{{width:.2f}\linewidth}}"}
        lines = [
            r"\begin{table}[H]\centering",
            rf"\caption*{{{self.escape(table.title)}}}\label{{tab:{table.name}}}",
            r"\begin{adjustbox}{max width=\linewidth}",
            rf"\begin{{tabular}}{{{''.join(kinds[column.kind] for column in table.columns)}}}",
            r"\toprule",
            *self._groups(table.groups()),
            " & ".join(self.escape(column.label) for column in table.columns) + r" \\",
        ]
        for block in table.blocks:
            lines += [r"\midrule", *map(self._row, block)]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}"]
        lines += [rf"\par\smallskip{{\footnotesize {self.text(note)}\par}}" for note in table.notes]
        return "\n".join([*lines, r"\end{table}"])

    def text(self, inline: Inline) -> str:
        commands = {"plain": "{}", "code": r"\texttt{{{}}}", "strong": r"\textbf{{{}}}"}
        return "".join(commands[span.kind].format(self.escape(span.text)) for span in _spans(inline))

    def escape(self, text: str) -> str:
        return "".join(LATEX_SPECIAL.get(c, c) for c in _one_line(text) if c.isprintable() or c in LATEX_SPECIAL)

    def _row(self, row: Row) -> str:
        cells = " & ".join(map(self.text, row.values()))
        # A bracket at the start would be read as the option of the line break before it.
        return ("{}" if cells.startswith("[") else "") + cells + r" \\"

    def _groups(self, groups: Sequence[tuple[str, int]]) -> list[str]:
        """The line of group names and the rules below them; nothing without groups."""
        cells, rules, first = [], [], 1
        for name, width in groups:
            cells.append(rf"\multicolumn{{{width}}}{{c}}{{{self.escape(name)}}}" if name else " & " * (width - 1))
            rules += [rf"\cmidrule(lr){{{first}-{first + width - 1}}}"] if name else []
            first += width
        return [" & ".join(cells) + r" \\", " ".join(rules)] if groups else []


def _spans(inline: Inline) -> list[Span]:
    parts = inline if isinstance(inline, tuple) else (inline,)
    return [part if isinstance(part, Span) else Span(part) for part in parts]


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
