"""Tables and short texts, as Markdown and as LaTeX.

All text is plain: nothing in it is markup, whatever a model has written. The LaTeX is for `\\input` into a document
that uses LATEX_PACKAGES, and for XeLaTeX or LuaLaTeX with a font that has the text's characters.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MISSING = "–"
# What GitHub's Markdown reads as markup inside a line; an underscore between letters is none.
MARKDOWN_MARKUP = re.compile(r"[\\`*|\[$]|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|&(?=[#\w])|~(?=~)")
LATEX_PACKAGES = r"\usepackage{adjustbox,booktabs,caption,float,graphicx,textcomp}"
LATEX_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
LATEX_SPECIAL = {
    **{character: f"\\{character}" for character in "#$%&_{}"},
    **{character: rf"\text{name}{{}}" for character, name in (LATEX_NAMES | {'"': "quotedbl"}).items()},
    # Quotes and hyphens without ligatures; a bracket that is no option of the line break before it.
    **{"'": "{'}", "`": r"{\textasciigrave}", "-": "{-}", "[": "{[}"},
}
TEXT_WIDTH = 0.75  # of the line, for a table's columns of long text together


@dataclass(frozen=True)
class Span:
    text: str
    kind: Literal["plain", "code", "strong"] = "plain"


def code(text: str) -> Span:
    return Span(text, "code")


Inline = str | Span | tuple[str | Span, ...]
Row = Mapping[str, Inline]  # cells by the heads of their columns


@dataclass(frozen=True)
class Table:
    """Blocks of rows with the same heads, separated by a line. `name` is its label in LaTeX.

    labels: how many of the first columns contain text; the others contain numbers.
    """

    name: str
    title: str
    blocks: Sequence[Sequence[Row]]
    labels: int
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block]

    @property
    def heads(self) -> list[str]:
        """The columns, without those whose cells are all MISSING."""
        return [head for head in self.rows[0] if any(row[head] != MISSING for row in self.rows)]


def number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    """A number as it is printed, `MISSING` where there is none; a minus is U+2212."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    if not any(digit in text for digit in "123456789"):  # no sign on what rounds to zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


class Markdown:
    """GitHub's Markdown."""

    def document(self, title: str, blocks: Sequence[str]) -> str:
        return "\n\n".join([f"# {self.escape(title)}", *blocks]) + "\n"

    def heading(self, text: str) -> str:
        return f"## {self.escape(text)}"

    def picture(self, path: str) -> str:
        return f"![]({path})"

    def table(self, table: Table) -> str:
        """Title, table, notes."""
        return "\n\n".join([f"**{self.escape(table.title)}**", self.cells(table), *map(self.text, table.notes)])

    def cells(self, table: Table) -> str:
        """The table alone."""
        heads = table.heads
        kinds = ["---"] * table.labels + ["---:"] * (len(heads) - table.labels)
        rows = [[self.text(row[head]) for head in heads] for row in table.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in (list(map(self.escape, heads)), *rows)]
        return "\n".join([lines[0], f"|{'|'.join(kinds)}|", *lines[1:]])

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
    """Sections, paragraphs, figures, and booktabs tables no wider than the line."""

    def document(self, title: str, blocks: Sequence[str]) -> str:
        return "\n\n".join([f"% {_one_line(title)}; needs {LATEX_PACKAGES}", *blocks]) + "\n"

    def heading(self, text: str) -> str:
        return rf"\section*{{{self.escape(text)}}}"

    def picture(self, path: str) -> str:
        return f"\\begin{{figure}}[H]\n\\includegraphics[width=\\linewidth]{{{path}}}\n\\end{{figure}}"

    def table(self, table: Table) -> str:
        """Title, table, notes. Where all columns contain text, those after the first wrap."""
        heads = table.heads
        numbers = len(heads) - table.labels
        width = rf"p{{{TEXT_WIDTH / max(1, len(heads) - 1):.2f}\linewidth}}"
        kinds = "l" * table.labels + "r" * numbers if numbers else "l" + width * (len(heads) - 1)
        lines = [
            r"\begin{table}[H]\centering",
            rf"\caption*{{{self.escape(table.title)}}}\label{{tab:{table.name}}}",
            rf"\begin{{adjustbox}}{{max width=\linewidth}}\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            " & ".join(map(self.escape, heads)) + r" \\",
        ]
        for block in table.blocks:
            lines.append(r"\midrule")
            lines += [" & ".join(self.text(row[head]) for head in heads) + r" \\" for row in block]
        lines += [r"\bottomrule", r"\end{tabular}\end{adjustbox}"]
        lines += [rf"\par\smallskip{{\footnotesize {self.text(note)}\par}}" for note in table.notes]
        return "\n".join([*lines, r"\end{table}"])

    def text(self, inline: Inline) -> str:
        commands = {"plain": "{}", "code": r"\texttt{{{}}}", "strong": r"\textbf{{{}}}"}
        return "".join(commands[span.kind].format(self.escape(span.text)) for span in _spans(inline))

    def escape(self, text: str) -> str:
        return "".join(LATEX_SPECIAL.get(c, c) for c in _one_line(text) if c.isprintable())


def _spans(inline: Inline) -> list[Span]:
    parts = inline if isinstance(inline, tuple) else (inline,)
    return [part if isinstance(part, Span) else Span(part) for part in parts]


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
