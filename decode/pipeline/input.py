"""Standard input as it arrives: lines that are there now are taken together, and nobody waits for a line to come."""

import os
import select
from collections.abc import Iterator

from corpora import iter_lines
from minillama import InputError

CHUNK = 1 << 16


class LineSource:
    """Raw lines of a file descriptor. Iteration blocks for the next line; `ready` tells whether it would."""

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
        """A whole line is here. Takes in what the descriptor has, without waiting for more."""
        while not self.lines and not self.ended and select.select([self.descriptor], [], [], 0)[0]:
            self._read()
        return bool(self.lines)

    def _read(self) -> None:
        chunk = os.read(self.descriptor, CHUNK)
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        self.lines = [line + b"\n" for line in reversed(lines)]
        if not chunk:
            self.ended = True
            if self.partial:
                self.lines.insert(0, self.partial)


def windows(descriptor: int, largest: int, name: str = "standard input") -> Iterator[list[str]]:
    """Groups of 1 to `largest` lines: all that have arrived by the time the consumer asks."""
    source = LineSource(descriptor)
    lines = iter_lines(source, name)
    for line in lines:
        window = [line]
        fault = None
        while len(window) < largest and source.ready():
            try:
                window.append(next(lines))
            except InputError as error:  # the good lines before a bad one are still to be answered
                fault = error
                break
        yield window
        if fault is not None:
            raise fault
