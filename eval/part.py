"""One part of a study's corpus as two line-aligned text files: `python -m eval.part --languages ja en … --output X`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from corpora import Pairs, read_pairs
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.part", description="Write one part of a corpus as text.")
    parser.add_argument("--languages", nargs=2, required=True, metavar="LANG", help="codes; also the files' names")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="FILE", help="two files, or a named split")
    parser.add_argument(
        "--lines", nargs=2, type=int, metavar="N", help="the first and the last line to use, counted from 1"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    pairs = read_pairs(arguments.pairs, *arguments.languages)
    if arguments.lines:
        first, last = arguments.lines
        if last > len(pairs):
            raise InputError(f"{pairs.origin}: {len(pairs):,} pairs; lines {first:,} to {last:,} are requested")
        here, origin = slice(first - 1, last), f"{pairs.origin}, lines {first:,} to {last:,}"
        pairs = Pairs(pairs.source[here], pairs.target[here], 0, origin, pairs.details)
    with atomic_folder(Path(arguments.output)) as folder:
        for language, lines in zip(arguments.languages, (pairs.source, pairs.target)):
            (folder / f"{language}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / "origin.txt").write_text(pairs.describe() + "\n", encoding="utf-8")
    print(pairs.describe(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
