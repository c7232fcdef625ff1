"""A Markdown page as blocks with the comments that trace their figures (eval.figures says what those mean).

Only as much of Markdown as the pages here use: blocks end at empty lines, tables begin with a bar, code is fenced or
indented by four spaces.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from minillama.errors import InputError

# At the start of a line: what stands in code or in a sentence is an example of a comment.
COMMENT = re.compile(r"^ {0,3}<!--\s*(figures|settings):(.*?)-->[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Trace:
    """A comment: `kind` figures or settings, its entries, its line."""

    kind: str
    entries: tuple[str, ...]
    line: int


@dataclass
class Block:
    """Lines with their numbers; `traces` are the places in Page.traces of the comments that hold for it."""

    kind: str  # "text", "table", "code"
    lines: list[tuple[int, str]]
    traces: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    blocks: list[Block]
    traces: list[Trace]


def read_page(path: Path) -> Page:
    """Raises InputError where the page cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a Markdown page") from None
    traces: list[Trace] = []
    places: dict[int, int] = {}  # the last line of a comment -> its place in traces

    def blanked(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        entries = tuple(entry.strip() for entry in match.group(2).replace("\n", ",").split(",") if entry.strip())
        places[line + match.group().count("\n")] = len(traces)
        traces.append(Trace(match.group(1), entries, line))
        return "\n".join(["<!---->"] * (match.group().count("\n") + 1))

    lines = re.sub(COMMENT, blanked, text)
    # other comments say nothing to a reader either, but keep their lines
    lines = re.sub(r"<!--(?!-->).*?-->", lambda match: "\n" * match.group().count("\n"), lines, flags=re.DOTALL)
    return Page(_blocks(lines.split("\n"), places), traces)


def _blocks(lines: list[str], places: dict[int, int]) -> list[Block]:
    blocks: list[Block] = []
    section: list[int] = []  # comments that hold to the next heading
    above: list[int] = []  # comments directly above
    current: Block | None = None
    fence = ""
    for number, line in enumerate(lines, 1):
        if fence:
            if line.strip().startswith(fence):
                fence, current = "", None
            elif current is not None:
                current.lines.append((number, line))
            continue
        opening = re.match(r"\s*(```+|~~~+)", line)
        if opening:
            fence = opening.group(1)
            current = Block("code", [], [*section, *above])
            blocks.append(current)
            above = []
        elif line.strip() == "<!---->":
            current = None
            above += [places[number]] if number in places else []
        elif not line.strip():
            section, above = [*section, *above], []
            current = None
        elif re.match(r"#{1,6} ", line):
            section, above, current = [], [], None
        else:
            if current is None:
                kind = "code" if line.startswith("    ") else "table" if line.lstrip().startswith("|") else "text"
                current = Block(kind, [], [*section, *above])
                blocks.append(current)
                above = []
            current.lines.append((number, line))
    return blocks
