"""Translations to a file or standard output, a line each in input order, each as soon as all before it are done."""

import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from minillama import InputError


def check_writable(path: str, inputs: list[str]) -> None:
    """Raise InputError, before any work, for an output that cannot be written or that is one of the inputs."""
    if path == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{path}: is a folder; the output must be a file")
    if file.exists() and any(name != "-" and Path(name).exists() and file.samefile(name) for name in inputs):
        raise InputError(f"{path}: is also an input; writing it would lose the input")
    try:
        if file.exists():
            with open(file, "ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


class OrderedWriter:
    """`put(line, text)` in any order; lines leave in theirs. Line numbers start at 0, none is given twice."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.next = 0
        self.count = 0
        self.last = -1
        self.waiting: dict[int, str] = {}

    def __enter__(self) -> "OrderedWriter":
        # Standard output through a descriptor of our own: UTF-8 and bare line feeds, whatever the locale says.
        target = os.dup(sys.stdout.fileno()) if self.path == "-" else self.path
        self.stream: TextIO = open(target, "w", encoding="utf-8", newline="\n")
        return self

    def put(self, line: int, text: str, translated: bool = True) -> None:
        """Take a finished line, a blank one with translated=False. An interruption waits until all is written."""
        with _uninterrupted():
            self.count += translated
            self.last = max(self.last, line) if translated else self.last
            self.waiting[line] = text
            self._write_ready()

    def write_finished(self) -> int:
        """After an interruption: write what waits behind an unfinished line, that line empty; returns how many are."""
        with _uninterrupted():
            gaps = [line for line in range(self.next, self.last) if line not in self.waiting]
            self.waiting = {line: text for line, text in self.waiting.items() if line <= self.last}
            self.waiting.update(dict.fromkeys(gaps, ""))
            self._write_ready()
        return len(gaps)

    def _write_ready(self) -> None:
        while self.next in self.waiting:
            self.stream.write(self.waiting.pop(self.next) + "\n")
            self.next += 1
        self.stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Safe on the disk before a journal goes.
        if self.path != "-" and stat.S_ISREG(os.fstat(self.stream.fileno()).st_mode):
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.stream.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for a moment, so that no line is half written or lost.

    Python's handlers are exchanged: a signal mask would not do, other threads of the process would take the signal.
    """
    held: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: held.append(number)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
    if held:
        raise KeyboardInterrupt
