"""Every measured figure on a page traced to the file it was measured into: `python -m eval.figures [PAGE.md …]`.

A page says where its figures come from in comments that a reader does not see:

    <!-- figures: demo/scores.json -->              a run file, from the root of the checkout; several with commas
    <!-- figures: decode/results/*.json#rows/batch=1&system=ours -->      only that part of it
    <!-- figures: train/loop.py#SPIKE -->           a constant: the lines of a text file that contain SPIKE
    <!-- settings: 2e-5, 0.5 -->                    numbers that nobody measured, named one by one

A comment directly above a block (paragraph, list, table, code) holds for that block; one with an empty line below it,
to the next heading. What is a figure: a decimal number, or a whole one with a unit (`UNITS`), also where the unit
stands in a table's head; inside code only numbers with a unit, since commands are full of decimals. Versions are none.
A figure must be a number of its file, rounded to the digits printed and scaled by its unit (0.054 is 5.4%).

Fails (exit code 1) for a figure without a trace, one that its files do not hold, a file that is not there, and a
comment that traces or exempts nothing.
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.pages import Block, Page, read_page
from minillama.cli import Parser
from minillama.errors import InputError, exit_code

ROOT = Path(__file__).resolve().parent.parent
DIARY = "JOURNAL.md"  # entries of their day, not claims about today's code
KIB = 2.0**-10
# A figure's unit as it is printed, and by what a value may have been multiplied to be printed in it.
UNITS: dict[str, tuple[float, ...]] = {
    "%": (1e2,),
    r"BLEU|chrF2?|nats|points|times|[x×](?!\s*\d)|GFLOP/s|GFLOPS|TFLOP/s": (),
    "tokens/s|tok/s|tokens per second|tokens a second|sentences/s|sentences a second": (),
    "KB|KiB": (1e-3, KIB),
    "MB/s|MB|MiB": (1e-6, KIB**2, 1e-3, KIB),
    "GB/s|GB|GiB": (1e-9, KIB**3, 1e-3, KIB),
    "µs": (1e6, 1e3),
    "ms": (1e3,),
    "s|seconds": (1e-3,),
    "min|minutes": (1 / 60,),
    "h|hours": (1 / 3600,),
    "M|million": (1e-6,),
}
SCALES = {re.compile(rf"[ \n]?(?:{unit})(?![\w/])"): scales for unit, scales in UNITS.items()}
HEADS = re.compile(r"(?<!\w)(?:" + "|".join(unit for unit in UNITS if unit != "M|million") + r")(?!\w)|\bp\b")
NUMBER = re.compile(r"(?<![\w.,])(?<!\w-)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?(?!\.?\d)(?![\w.]*_)")
VERSIONED = re.compile(
    r"(?:Python|[Tt]orch|[Tt]riton|transformers|CUDA|CC BY|OpenVINO|CTranslate2|sacrebleu|bert-score|[Vv]ersion)"
    r"(?: ≥|>=)? ?$"
)
SCORE = re.compile(r"(?<![\w-])(?:BLEU|chrF2?|p)\s*[=:]?\s*$")


@dataclass(frozen=True)
class Figure:
    """A number as it is printed, its line, and the scales its unit allows."""

    text: str
    line: int
    scales: tuple[float, ...]

    def equals(self, value: float) -> bool:
        """Whether the value rounds to what is printed."""
        digits, _, exponent = self.text.replace(",", "").partition("e")
        printed = float(digits + (f"e{exponent}" if exponent else ""))
        decimals = len(digits.partition(".")[2]) - int(exponent or 0)
        tolerance = 0.5 * 10.0**-decimals
        return any(abs(abs(value) * scale - printed) <= tolerance * (1 + 1e-9) for scale in (1.0, *self.scales))


def check(page: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with a page's figures, one line each; nothing where all are traced."""
    read = read_page(page)
    name = page.relative_to(root).as_posix() if page.is_relative_to(root) else str(page)
    held: dict[str, tuple[float, ...]] = {}
    faults = []
    for trace in read.traces:
        for source in trace.entries if trace.kind == "figures" else ():
            try:
                held[source] = values(root, source)
            except InputError as error:
                faults.append(f"{name}:{trace.line}: {error}")
                held[source] = ()
    used = set()
    for block in read.blocks:
        for figure in figures(block):
            found = _traced(read, block, figure, held)
            if isinstance(found, str):
                faults.append(f"{name}:{figure.line}: {found}")
            else:
                used.add(found)
    for number, trace in enumerate(read.traces):
        for entry in trace.entries:
            if trace.kind == "settings" and (number, entry) not in used:
                faults.append(f"{name}:{trace.line}: exempts {entry}, which does not stand there")
        if trace.kind == "figures" and not faults and not any(place == number for place, _ in used):
            faults.append(f"{name}:{trace.line}: traces no figure")
    return faults


def _traced(page: Page, block: Block, figure: Figure, held: dict[str, tuple[float, ...]]) -> tuple[int, str] | str:
    """(number of the comment, its entry) that covers a figure, or what is wrong. held: the numbers of each source."""
    sources = []
    for number in block.traces:
        trace = page.traces[number]
        for entry in trace.entries:
            if trace.kind == "settings":
                if entry == figure.text:
                    return number, entry
                continue
            sources.append(entry)
            if not held[entry] or any(figure.equals(value) for value in held[entry]):  # one not there is said once
                return number, entry
    if not sources:
        wanted = f"<!-- figures: RUN FILE --> above it, or <!-- settings: {figure.text} --> where nobody measured it"
        return f"{figure.text} has no trace; expected {wanted}"
    return f"{figure.text} is not in {', '.join(sources)}"


def figures(block: Block) -> Iterator[Figure]:
    """The figures of a block, in reading order."""
    first = block.lines[0][0] if block.lines else 0
    if block.kind == "code":
        yield from _figures("\n".join(text for _, text in block.lines), first, in_code=True)
    elif block.kind == "table":
        heads = _cells(block.lines[0][1])
        for line, text in block.lines[1:]:
            for place, cell in enumerate(_cells(text)):
                yield from _prose(cell, line, heads[place] if place < len(heads) else "")
    else:
        yield from _prose("\n".join(text for _, text in block.lines), first)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _prose(text: str, line: int, head: str = "") -> Iterator[Figure]:
    """Prose with code in it; `head` is that of a table's column. Addresses are no prose."""
    text = re.sub(r"\]\([^)]*\)|<?https?://\S+", "]", text)
    place = 0
    for code in re.finditer(r"(`+)(.+?)\1", text, re.DOTALL):
        yield from _figures(text[place : code.start()], line + text.count("\n", 0, place), head=head)
        yield from _figures(code.group(2), line + text.count("\n", 0, code.start()), in_code=True)
        place = code.end()
    yield from _figures(text[place:], line + text.count("\n", 0, place), head=head)


def _figures(text: str, line: int, in_code: bool = False, head: str = "") -> Iterator[Figure]:
    unit_above = HEADS.search(head)
    for match in NUMBER.finditer(text):
        before, after = text[: match.start()], text[match.end() :]
        unit = next((scales for pattern, scales in SCALES.items() if pattern.match(after)), None)
        if VERSIONED.search(before) or (unit is None and re.match(r"[A-Za-z_]", after)):
            continue
        is_decimal = bool(re.search(r"[.e]", match.group())) and not in_code
        if is_decimal or unit is not None or SCORE.search(before) or (unit_above and _whole(text, match)):
            scales = unit if unit is not None else _head_scales(head)
            yield Figure(match.group(), line + before.count("\n"), scales)


def _whole(text: str, match: re.Match[str]) -> bool:
    """Whether a cell is this number and nothing else but marks."""
    rest = text[: match.start()] + text[match.end() :]
    return not re.search(r"\w", rest)


def _head_scales(head: str) -> tuple[float, ...]:
    return tuple(
        scale for unit, scales in UNITS.items() if re.search(rf"(?<!\w)(?:{unit})(?!\w)", head) for scale in scales
    )


def values(root: Path, source: str) -> tuple[float, ...]:
    """All numbers of a source: "PATH" or "PATH#PART", PATH with * for several files.

    PART is for JSON and TOML a path of keys, list indices, and `key=value&key=value` for the items of a list of which
    that is true (rows/batch=1/seconds); for other files a text that a line must contain. Raises InputError where a file
    or a part of it is not there.
    """
    pattern, _, part = source.partition("#")
    paths = sorted(root.glob(pattern))
    if not paths:
        raise InputError(f"{pattern}: no such file")
    found = [value for path in paths for value in _numbers_of(path, part)]
    if not found:
        raise InputError(f"{source}: no number in it")
    return tuple(found)


def _numbers_of(path: Path, part: str) -> Iterator[float]:
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".json", ".toml", ".jsonl"):
        documents = (
            [tomllib.loads(text)]
            if path.suffix == ".toml"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else [json.loads(text)]
        )
        for document in documents:
            for piece in _select(document, [step for step in part.split("/") if step]):
                yield from _leaves(piece)
        return
    for line in text.splitlines():
        if part in line:
            yield from _numbers_in(line)


def _select(document: Any, steps: Sequence[str]) -> Iterator[Any]:
    """Pieces of a document behind a path of steps."""
    if not steps:
        yield document
        return
    step, rest = steps[0], steps[1:]
    if isinstance(document, dict):
        if step in document:
            yield from _select(document[step], rest)
    elif isinstance(document, list):
        if step.isdigit():
            yield from _select(document[int(step)], rest) if int(step) < len(document) else ()
        else:
            conditions = [condition.partition("=") for condition in step.split("&")]
            for item in document:
                if isinstance(item, dict) and all(str(item.get(key)) == value for key, _, value in conditions):
                    yield from _select(item, rest)


def _leaves(document: Any) -> Iterator[float]:
    if isinstance(document, dict):
        for value in document.values():
            yield from _leaves(value)
    elif isinstance(document, list):
        for value in document:
            yield from _leaves(value)
    elif isinstance(document, (int, float)) and not isinstance(document, bool):
        yield float(document)
    elif isinstance(document, str):
        yield from _numbers_in(document)


def _numbers_in(text: str) -> Iterator[float]:
    for match in re.finditer(r"\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?", text):
        yield float(match.group().replace(",", "").replace("_", ""))


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs/, but for the diary."""
    return [root / "README.md", *(page for page in sorted((root / "docs").glob("*.md")) if page.name != DIARY)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.figures",
        description="Checks that every measured figure of a page stands in the run file that the page names for it.",
    )
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files (default: README.md and docs/)")
    arguments = parser.parse_args(argv)
    read = [page.resolve() for page in arguments.pages] or pages()
    faults = [fault for page in read for fault in check(page)]
    print(*faults, sep="\n") if faults else print(f"{len(read)} pages: every figure is traced")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
