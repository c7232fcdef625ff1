"""Texts in: files as a whole, and standard input as it arrives, in groups of the lines that are there now."""

import os
import select
from collections.abc import Iterator

from corpora import iter_lines, read_lines
from minillama.errors import InputError

CHUNK_BYTES = 1 << 16
# Most batches in a group of lines: a large group keeps the slots busy, a small one holds less in memory.
GROUP_BATCHES = 16


class LineSource:
    """Raw lines of a file descriptor. Iteration blocks until a line is complete; `ready` says whether one is."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lines: list[bytes] = []  # complete lines, the next one last
        self.partial = b""
        self.ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self.lines and not self.ended:
            self._read()
        if self.lines:
            return self.lines.pop()
        raise StopIteration

    def ready(self) -> bool:
        """Whether a complete line is here. Reads what the descriptor has, without waiting for more."""
        while not self.lines and not self.ended and select.select([self.descriptor], [], [], 0)[0]:
            self._read()
        return bool(self.lines)

    def _read(self) -> None:
        chunk = os.read(self.descriptor, CHUNK_BYTES)
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        self.lines = [line + b"\n" for line in reversed(lines)]
        if not chunk:
            self.ended = True
            if self.partial:
                self.lines.insert(0, self.partial)


def read_available_lines(descriptor: int, most: int, name: str = "standard input") -> Iterator[list[str]]:
    """Groups of 1 to `most` lines: all that have arrived by the time the consumer asks.

    Raises InputError for bytes that are not UTF-8, after the lines before them.
    """
    source = LineSource(descriptor)
    lines = iter_lines(source, name)
    for line in lines:
        group = [line]
        fault = None
        while len(group) < most and source.ready():
            try:
                group.append(next(lines))
            except InputError as error:
                fault = error
                break
        yield group
        if fault is not None:
            raise fault


def read_texts(path: str, reference: str | None) -> tuple[list[str] | None, list[str] | None]:
    """The sentences (None for standard input, which is read later) and the references (None without a path).

    Raises InputError for files that are not line-aligned.
    """
    if path == reference == "-":
        raise InputError("--input and --reference are both standard input; one of them must be a file")
    sentences = None if path == "-" else read_lines(path)
    references = read_lines(reference) if reference else None
    if sentences is not None and references is not None and reference and len(sentences) != len(references):
        raise not_aligned(path, len(sentences), reference, len(references))
    return sentences, references


def not_aligned(source: str, lines: int, reference: str, others: int) -> InputError:
    return InputError(f"{source} has {lines:,} lines, {reference} has {others:,}; they must be line-aligned")
