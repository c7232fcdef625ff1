"""Lines of text files, in strict UTF-8.

Only a line feed ends a line: U+2028, U+0085 and a lone carriage return are part of a sentence, so two line-aligned
files stay aligned. A byte order mark and the carriage return of CRLF are removed; a line feed at the end of the file
starts no further line. Gzip is recognised by its first bytes or its suffix. What a line means (a sentence, a pair) is
not known here.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from minillama.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
DAMAGED = "the gzip data is truncated or damaged, expected a whole file"
STDIN = "-"


@dataclass(frozen=True)
class Texts:
    """Monolingual text: `documents` in file order, none blank; the number of `dropped` blank lines; its origin."""

    documents: list[str]
    dropped: int
    origin: str
    details: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.documents)

    def describe(self) -> str:
        """One line for a report or a log."""
        dropped = f", {self.dropped:,} empty lines dropped" if self.dropped else ""
        details = "".join(f", {key} {value}" for key, value in self.details.items())
        return f"{self.origin}: {len(self.documents):,} documents{dropped}{details}"


def read_lines(path: str | Path) -> list[str]:
    """Return all lines of a text file, gzipped or not; '-' is standard input.

    Raises InputError that names the file, and for bytes that are not UTF-8 also the line.
    """
    with open_binary(path) as stream:
        return list(iter_lines(stream, display_name(path)))


def iter_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a binary stream, each as soon as it has arrived; `name` is for error messages."""
    number = 0
    try:
        for raw in stream:
            number += 1
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            yield _decode(raw, name, number)
    except DAMAGED_GZIP as error:
        raise InputError(f"{name}:{number + 1}: {DAMAGED}") from error


@contextmanager
def open_binary(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed where they are gzip; '-' is standard input, which stays open.

    Raises InputError where the file cannot be opened, and for damaged gzip data that is read inside the block.
    """
    with nullcontext(sys.stdin.buffer) if str(path) == STDIN else _open_file(path) as file:
        start = file.peek(2)[:2]  # type: ignore[union-attr]
        if start == GZIP_MAGIC:
            try:
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield unzipped  # type: ignore[misc]
            except DAMAGED_GZIP as error:
                raise InputError(f"{display_name(path)}: {DAMAGED}") from error
        elif str(path).endswith(".gz") and start:
            raise InputError(f"{path}: not gzip data although its name ends in .gz")
        else:
            yield file


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes, decompressed where they are gzip."""
    with open_binary(path) as stream:
        return stream.read()


def display_name(path: str | Path) -> str:
    """The path as messages print it."""
    return "<stdin>" if str(path) == STDIN else str(path)


def _open_file(path: str | Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, expected a file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}), expected a readable file") from error


def _decode(raw: bytes, name: str, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            found = "a UTF-16 byte order mark"
        else:
            found = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise InputError(f"{name}:{number}: not valid UTF-8 ({found}), expected UTF-8 text") from error
