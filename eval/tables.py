"""Tables and short texts, as Markdown and as LaTeX.

All text is plain: nothing in it is markup, whatever a model has written. The LaTeX compiles with pdfLaTeX, XeLaTeX and
LuaLaTeX and needs booktabs, caption, float, graphicx and iftex. pdfLaTeX shows Japanese where CJKutf8 and its `min`
fonts are installed, and prints the code point of a character that it does not have.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal

MISSING = "–"
# What GitHub's Markdown reads as markup inside a line; an underscore between letters is none.
MARKDOWN_MARKUP = re.compile(r"[\\`*|\[$]|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|&(?=[#\w])|~(?=~)")
LATEX_HEAD = r"""\documentclass[a4paper,landscape,10pt]{article}
\usepackage[margin=18mm]{geometry}
\usepackage{iftex,booktabs,caption,float,graphicx}
\ifPDFTeX
  \usepackage[T1]{fontenc}
  \usepackage[utf8]{inputenc}
  \usepackage{textcomp}
  \newif\ifhascjk
  \IfFileExists{c70min.fd}{\hascjktrue\usepackage{CJKutf8}}{}
  \ifhascjk\newcommand{\cjk}[1]{\begin{CJK}{UTF8}{min}#1\end{CJK}}\else\newcommand{\cjk}[1]{[CJK]}\fi
  \newcommand{\otherchar}[2]{{\scriptsize[U+#2]}}
\else
  \usepackage{fontspec}
  \IfFontExistsTF{Noto Sans CJK JP}{\newfontfamily{\cjkfont}{Noto Sans CJK JP}}{\newcommand{\cjkfont}{}}
  \newcommand{\cjk}[1]{{\cjkfont #1}}
  \newcommand{\otherchar}[2]{#1}
\fi
\setlength{\parindent}{0pt}
\setlength{\parskip}{6pt}
\newsavebox{\tablebox}
% a table as it is, or scaled to the width of the line
\newcommand{\fitted}[1]{\sbox{\tablebox}{#1}%
  \ifdim\wd\tablebox>\linewidth\resizebox{\linewidth}{!}{\usebox{\tablebox}}\else\usebox{\tablebox}\fi}
"""
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
LATEX_PLAIN = set("–—‘’‚“”„…•€™")
CJK_OR_CHARACTER = re.compile(r"([\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+)|.", re.DOTALL)
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


@dataclass(frozen=True, eq=False)  # two columns of a table may have one label
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
        """Neighbouring columns of one group as (name, how many); empty where no column has a group."""
        groups: list[tuple[str, int]] = []
        for column in self.columns:
            if groups and column.group and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + 1)
            else:
                groups.append((column.group, 1))
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
    """A whole document; each table can also be copied out of it. Tables are booktabs' with rules below groups."""

    def document(self, title: str, blocks: Sequence[str]) -> str:
        parts = [rf"\section*{{\LARGE {self.escape(title)}}}", *blocks]
        return f"{LATEX_HEAD}\\begin{{document}}\n" + "\n\n".join(parts) + "\n\\end{document}\n"

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
            rf"\fitted{{\begin{{tabular}}{{{''.join(kinds[column.kind] for column in table.columns)}}}",
            r"\toprule",
            *self._groups(table.groups()),
            " & ".join(self.escape(column.label) for column in table.columns) + r" \\",
        ]
        for block in table.blocks:
            lines += [r"\midrule", *map(self._row, block)]
        lines += [r"\bottomrule", r"\end{tabular}}"]
        lines += [rf"\par\smallskip{{\footnotesize {self.text(note)}\par}}" for note in table.notes]
        return "\n".join([*lines, r"\end{table}"])

    def text(self, inline: Inline) -> str:
        commands = {"plain": "{}", "code": r"\texttt{{{}}}", "strong": r"\textbf{{{}}}"}
        return "".join(commands[span.kind].format(self.escape(span.text)) for span in _spans(inline))

    def escape(self, text: str) -> str:
        return CJK_OR_CHARACTER.sub(_latex_characters, _one_line(text))

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


def _latex_characters(match: re.Match[str]) -> str:
    """One character, or a run of Chinese, Japanese or Korean ones, as LaTeX that prints it."""
    text = match.group()
    if match.group(1):
        return rf"\cjk{{{text}}}"
    if text in LATEX_SPECIAL:
        return LATEX_SPECIAL[text]
    if " " <= text < "\x7f" or "\xa1" <= text <= "\u017f" or text in LATEX_PLAIN:
        return text
    return rf"\otherchar{{{text}}}{{{ord(text):04X}}}" if text.isprintable() else ""
