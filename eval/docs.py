"""docs/results.md from the committed run files: `python -m eval.docs [--check]`.

The page's words stand in docs/results.md.in, its figures in the run files that it names, a line each:

    {{ KIND PATH }}        KIND is one of eval.docs_tables.KINDS, PATH may have * for several files

A line becomes the tables of each file, newest first, under a heading with the device and the date. A section (from `##`
to the next) none of whose files is there yet is left out whole. `--check` writes nothing and fails (exit code 1) where
the page is not what the run files give, so no figure on it is ever typed.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.docs_tables import KINDS, Part
from eval.document import Heading, Table
from eval.figures import ROOT
from eval.render import markdown_block, markdown_table
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

TEMPLATE, PAGE = "docs/results.md.in", "docs/results.md"
LINE = re.compile(r"^\{\{ *(\S+) +(\S+) *\}\}$")
EXAMPLES = """examples:
  python -m eval.docs                build docs/results.md again, after a run file has come or gone
  python -m eval.docs --check        for tests: is the page what the run files give?
"""


def build(root: Path = ROOT) -> str:
    """The page's text. Raises InputError for a line of the template or a run file that cannot be read."""
    text = (root / TEMPLATE).read_text(encoding="utf-8")
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return "".join(_section(section, root) for section in sections).rstrip() + "\n"


def _section(section: str, root: Path) -> str:
    """A section with its lines filled in; nothing where it has lines and no file for any of them."""
    lines, asked, found = [], 0, 0
    for line in section.splitlines():
        match = LINE.match(line)
        if match is None:
            lines.append(line)
            continue
        asked += 1
        text = _filled(match.group(1), match.group(2), root)
        found += bool(text)
        lines.append(text)
    if asked and not found:
        return ""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _filled(kind: str, pattern: str, root: Path) -> str:
    """All files of one line of the template, newest first; each with the comment that traces its figures."""
    if kind not in KINDS:
        raise InputError(f"{TEMPLATE}: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    texts = []
    for path in sorted(root.glob(pattern), reverse=True):
        try:
            parts = KINDS[kind](json.loads(path.read_text(encoding="utf-8")), path)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a run file of kind {kind} ({error!r})") from None
        blocks = [_part(part) for part in parts]
        after_heading = sum(isinstance(part.block, Heading) for part in parts[:1])
        blocks.insert(after_heading, f"<!-- figures: {path.relative_to(root).as_posix()} -->")
        texts += blocks
    return "\n\n".join(texts)


def _part(part: Part) -> str:
    if not isinstance(part.block, Table) or not part.folded:
        return markdown_block(part.block)
    body = markdown_table(part.block, titled=False)
    return f"<details><summary>{part.block.title}</summary>\n\n{body}\n\n</details>"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.docs",
        description="Builds docs/results.md from docs/results.md.in and the committed run files.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--check", action="store_true", help="fail where the page differs, write nothing")
    arguments = parser.parse_args(argv)
    page, text = ROOT / PAGE, build()
    if not arguments.check:
        atomic_write(page, text)
        print(PAGE)
        return 0
    difference = first_difference(page.read_text(encoding="utf-8") if page.exists() else "", text)
    if difference is None:
        print(f"{PAGE}: as the run files give it")
        return 0
    print(f"{PAGE}:{difference}: not what the run files give, expected the page of python -m eval.docs")
    return 1


def first_difference(one: str, other: str) -> int | None:
    """The number of the first line that two texts do not share, None where they are the same."""
    if one == other:
        return None
    lines: list[Any] = [one.splitlines(), other.splitlines()]
    pairs = enumerate(zip(*lines), 1)
    return next((number for number, (a, b) in pairs if a != b), min(map(len, lines)) + 1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
