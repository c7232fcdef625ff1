"""Pairs of sentences from TSV, JSON lines, parquet, arrow, or two line-aligned text files.

Every format may be gzipped. A pair with a blank side is dropped and counted. A sentence is one line: line breaks
inside a JSON or parquet value become spaces, so that outputs stay line-aligned.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corpora.tables import read_records
from corpora.text import STDIN, display_name, read_lines
from minillama.errors import InputError

_LINE_BREAKS = re.compile(r"\s*[\r\n]+\s*")


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs in file order: `source[i]` and `target[i]` belong together and neither is blank.

    dropped: how many pairs had a blank side.   origin: the files or the split, for messages.
    details: a named split's seed, counts and revision, for reports.
    """

    source: list[str]
    target: list[str]
    dropped: int
    origin: str
    details: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        """One line for a report or a log."""
        dropped = f", {self.dropped:,} dropped (an empty side)" if self.dropped else ""
        details = "".join(f", {key} {value}" for key, value in self.details.items())
        return f"{self.origin}: {len(self.source):,} pairs{dropped}{details}"


def read_pair_files(files: Sequence[str | Path], source: str, target: str) -> Pairs:
    """Read one file of pairs, or two line-aligned text files; see corpora.read.read_pairs."""
    if len(files) == 2:
        return _read_aligned(files[0], files[1])
    if len(files) != 1:
        raise InputError(f"expected one file of pairs or two line-aligned files, found {len(files)} files")
    reader = _read_tsv if str(files[0]) == STDIN else READERS.get(_suffix(files[0]))
    if reader is None:
        raise InputError(
            f"{files[0]}: unknown format of pairs, expected a name ending in one of {', '.join(READERS)} (.gz allowed),"
            " or two files"
        )
    return drop_blank(reader(files[0], source, target), display_name(files[0]))


def drop_blank(records: Iterable[tuple[str, str]], origin: str, details: Mapping[str, object] | None = None) -> Pairs:
    """The records without those that have a blank side, which are counted."""
    found = list(records)
    kept = [pair for pair in found if not is_blank(*pair)]
    sources, targets = ([one_line(pair[side]) for pair in kept] for side in (0, 1))
    return Pairs(sources, targets, len(found) - len(kept), origin, details or {})


def is_blank(source: str, target: str) -> bool:
    """Whether one of the sides is empty or white space."""
    return not source.strip() or not target.strip()


def one_line(text: str) -> str:
    """Replace line breaks by spaces; a text without any is returned unchanged."""
    if "\n" not in text and "\r" not in text:
        return text
    return _LINE_BREAKS.sub(" ", text.strip("\r\n"))


def _suffix(path: str | Path) -> str:
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def _read_aligned(source_path: str | Path, target_path: str | Path) -> Pairs:
    names = display_name(source_path), display_name(target_path)
    if names[0] == names[1]:
        raise InputError(f"{names[0]}: given as both source and target, expected two line-aligned files")
    for path in (source_path, target_path):
        if _suffix(path) in READERS:
            raise InputError(f"{path}: already holds pairs, expected it alone, or two plain text files")
    sources, targets = read_lines(source_path), read_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{names[0]} has {len(sources)} lines and {names[1]} has {len(targets)}, expected the same number"
        )
    return drop_blank(zip(sources, targets), " + ".join(names))


def _read_tsv(path: str | Path, source: str, target: str) -> Iterator[tuple[str, str]]:
    swapped = False
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t")
        if number == 1 and columns in ([source, target], ["source", "target"]):
            continue
        if number == 1 and columns in ([target, source], ["target", "source"]):
            swapped = True
            continue
        if not line.strip():
            columns = ["", ""]
        if len(columns) != 2:
            raise InputError(f"{display_name(path)}:{number}: expected 2 columns, found {len(columns)}")
        yield (columns[1], columns[0]) if swapped else (columns[0], columns[1])


def _read_json_lines(path: str | Path, source: str, target: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{display_name(path)}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}), expected one object per line") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield _sides(record, source, target, where)


def _sides(record: Mapping[str, object], source: str, target: str, where: str) -> tuple[str, str]:
    inner = record.get("translation", record)
    if not isinstance(inner, Mapping):
        raise InputError(f'{where}: "translation" is {type(inner).__name__}, expected an object')
    for keys in ((source, target), ("source", "target")):
        if all(key in inner for key in keys):
            return _text(inner[keys[0]], keys[0], where), _text(inner[keys[1]], keys[1], where)
    found = ", ".join(f'"{key}"' for key in list(inner)[:5]) or "none"
    raise InputError(f'{where}: expected keys "{source}" and "{target}", or "source" and "target", found {found}')


def _text(value: object, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" is {type(value).__name__}, expected a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f'{where}: "{key}" has a lone surrogate escape, expected Unicode text') from error
    return value


READERS: dict[str, Callable[[str | Path, str, str], Iterator[tuple[str, str]]]] = {
    ".tsv": _read_tsv,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json_lines),
    **dict.fromkeys((".parquet", ".arrow", ".feather"), read_records),
}
