"""A report as data: headings, paragraphs, tables, pictures. Markdown, LaTeX and HTML are eval.render's to know.

Text is plain wherever it comes from: nothing in it is markup, whatever a model may have written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MISSING = "–"


@dataclass(frozen=True)
class Span:
    """Text with a kind; `lang` is a language code where it is not English."""

    text: str
    kind: Literal["plain", "code", "strong"] = "plain"
    lang: str = ""


Inline = str | Span | tuple["str | Span", ...]


def code(text: str) -> Span:
    return Span(text, "code")


def strong(text: str) -> Span:
    return Span(text, "strong")


def spans(inline: Inline) -> tuple[Span, ...]:
    """Any inline text as spans."""
    parts = inline if isinstance(inline, tuple) else (inline,)
    return tuple(part if isinstance(part, Span) else Span(part) for part in parts)


@dataclass(frozen=True)
class Heading:
    level: int  # 1 is the title
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: Inline


@dataclass(frozen=True)
class Picture:
    """Two files of one plot, relative to the report's folder; `svg` is its text, for a page that holds everything."""

    png: Path
    svg: str
    description: str


@dataclass(frozen=True)
class Column:
    """`group` stands above neighbouring columns of the same group. `kind`: text, number, or long text that wraps."""

    label: str
    kind: Literal["text", "number", "long"] = "text"
    group: str = ""

    @property
    def full_label(self) -> str:
        return f"{self.group} {self.label}".strip()


@dataclass(frozen=True)
class Row:
    cells: tuple[Inline, ...]
    rule: bool = False  # a line above it: a new block of rows begins


@dataclass(frozen=True)
class Table:
    """`name` is a word for links and labels. Every row has as many cells as there are columns."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[Inline, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"{self.name}: a row of {len(row.cells)} cells under {len(self.columns)} columns")

    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of one group as (name, how many); nothing where no column has a group."""
        if not any(column.group for column in self.columns):
            return []
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and column.group and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


Block = Heading | Paragraph | Picture | Table


@dataclass
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block | None) -> None:
        """Appends what there is; a part that a study has no figures for is None."""
        self.blocks += [block for block in blocks if block is not None]

    def section(self, title: str, blocks: Sequence[Block | None], level: int = 2) -> None:
        """A heading and its blocks, nothing where all blocks are missing."""
        if any(block is not None for block in blocks):
            self.add(Heading(level, title), *blocks)


def number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    """A figure as it is printed, `MISSING` where there is none; a minus is U+2212."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    if not any(digit in text for digit in "123456789"):  # no sign on what rounds to zero
        text = text.lstrip("+-")
    return text.replace("-", "−")
