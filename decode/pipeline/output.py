"""Finished lines to files or standard output, in input order, each as soon as all before it are done; and progress.

`Outputs` writes all files of a run of decode.collab. It holds what waits for an earlier line, and the texts only where
references will be compared with them.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from decode.pipeline.journal import Record, journal_path
from minillama.errors import InputError
from minillama.files import sync

# Seconds between two lines of progress where there is no terminal.
LINE_SECONDS = 30.0


def check_writable(path: str, others: list[str]) -> None:
    """Raise InputError, before any work, for an output that cannot be written or that is one of the other files."""
    if path == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{path}: is a folder; the output must be a file")
    if file.exists() and any(name != "-" and Path(name).exists() and file.samefile(name) for name in others):
        raise InputError(f"{path}: is also an input; writing it would lose the input")
    if not os.access(file if file.exists() else file.parent, os.W_OK) or not file.parent.is_dir():
        raise InputError(f"{path}: cannot be written; it needs a folder that is there, and permission to write")


def check_outputs(arguments: argparse.Namespace, processes: int) -> None:
    """Raise InputError for outputs that cannot be written or replace one another, and for what cannot be resumed."""
    for option in ("report", "details", "nbest_output"):
        if getattr(arguments, option) == "-":
            raise InputError(f"--{option.replace('_', '-')} -: give a file; standard output is for translations")
    if arguments.nbest_output and not arguments.nbest:
        raise InputError("--nbest-output has no effect without --nbest; give --nbest too")
    if arguments.nbest and not arguments.nbest_output and journal_path(arguments.output) is None:
        raise InputError("--nbest: with translations on standard output, name a file for the lists by --nbest-output")
    others = [file for file in (arguments.input, arguments.reference) if file]
    for file in (arguments.output, arguments.report, arguments.details, nbest_path(arguments), arguments.explain):
        if file:
            check_writable(file, others)
            others.append(file)
    if arguments.input == "-" or journal_path(arguments.output) is None:
        if arguments.resume:
            raise InputError("--resume: needs --input FILE and --output FILE, beside which the journal is")
        if processes > 1:
            raise InputError(f"{processes} processes share one file's sentences: give --input FILE and --output FILE")


def nbest_path(arguments: argparse.Namespace) -> str | None:
    """The file for n-best lists, None if none are requested."""
    return (arguments.nbest_output or f"{arguments.output}.nbest") if arguments.nbest else None


class OrderedWriter:
    """A context: `put(line, text)` in any order; lines are written in theirs. Lines count from 0, each is put once."""

    fills_gaps = True

    def __init__(self, path: str) -> None:
        self.path = path
        self.next = self.count = 0
        self.last = -1
        self.waiting: dict[int, str] = {}

    def __enter__(self) -> "OrderedWriter":
        # Standard output through a descriptor of our own: UTF-8 and bare line feeds in any locale.
        target = os.dup(sys.stdout.fileno()) if self.path == "-" else self.path
        self.stream: TextIO = open(target, "w", encoding="utf-8", newline="\n")
        return self

    def put(self, line: int, text: str, translated: bool = True) -> None:
        """Accept a finished line, a blank one with translated=False. An interruption waits until it is written."""
        with _uninterrupted():
            self.count += translated
            self.last = max(self.last, line) if translated else self.last
            self.waiting[line] = text
            while self.next in self.waiting:
                self.stream.write(self.waiting.pop(self.next) + "\n")
                self.next += 1
            self.stream.flush()

    def put_sentence(self, line: int, source: str, record: Record | None) -> None:
        """The same for a sentence; record: None for a line that is blank or was skipped."""
        self.put(line, self.format(line, source, record), translated=record is not None)

    def format(self, line: int, source: str, record: Record | None) -> str:
        return record.text if record else ""

    def write_finished(self) -> int:
        """After an interruption: write what is finished after unfinished lines too; returns the number of those.

        Where gaps are filled an unfinished line is empty, else it is left out.
        """
        lines = range(self.next, self.last + 1)
        with _uninterrupted():
            for line in lines:
                if self.fills_gaps or line in self.waiting:
                    self.stream.write(self.waiting.get(line, "") + "\n")
            self.stream.flush()
        return sum(line not in self.waiting for line in lines)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()
        if self.path != "-" and Path(self.path).is_file():
            sync(Path(self.path))  # before a journal is removed


class DetailsWriter(OrderedWriter):
    """Records as JSON lines."""

    fills_gaps = False

    def format(self, line: int, source: str, record: Record | None) -> str:
        entry = record.to_json() if record else {"line": line + 1, "text": "", "tokens": [], "logprobs": []}
        return json.dumps(entry, ensure_ascii=False)


class NBestWriter(OrderedWriter):
    """N-best lists as Moses and Marian write them: `line ||| text ||| F0= log-probability ||| score`, best first.

    Lines count from 0; F0 is the sum of the log-probabilities in nats, the score that sum normalised by length. A line
    that is blank or was skipped has one empty entry with two zeros. A text may contain ` ||| ` itself: two numbers
    follow the last two.
    """

    fills_gaps = False

    def format(self, line: int, source: str, record: Record | None) -> str:
        if record is None:
            return f"{line} |||  ||| F0= 0 ||| 0"
        return "\n".join(f"{line} ||| {text} ||| F0= {nats:.6f} ||| {score:.6f}" for text, nats, score in record.nbest)


class Outputs:
    """Every file of a run. `put` accepts lines in any order; a record that comes again is dropped."""

    def __init__(
        self, arguments: argparse.Namespace, total: int | None, explanations: OrderedWriter | None, files: ExitStack
    ) -> None:
        """total: lines of the input, where that is known.   explanations: what decode.explain writes, instead of
        translations where both go to standard output.   files: closes them.
        """
        self.where = "on standard output" if arguments.output == "-" else f"in {arguments.output}"
        self.total = total
        self.writer = OrderedWriter(os.devnull if arguments.explain == arguments.output == "-" else arguments.output)
        details = DetailsWriter(arguments.details) if arguments.details else None
        nbest = NBestWriter(path) if (path := nbest_path(arguments)) else None
        self.writers = [w for w in (self.writer, details, nbest, explanations) if w is not None]
        for writer in self.writers:
            files.enter_context(writer)
        self.progress = DecodeProgress(total)
        files.callback(self.progress.stop)
        self.texts: dict[int, str] | None = {} if arguments.reference else None
        self.tokens = self.resumed = self.resumed_tokens = 0

    def put(self, line: int, source: str, record: Record | None, resumed: bool = False) -> None:
        """source: the input's line.   record: None for a line that is blank or was skipped.   resumed: an earlier run
        finished it; it does not count for the speed.
        """
        if line < self.writer.next or line in self.writer.waiting:
            return
        tokens = len(record.tokens) if record else 0
        self.tokens += tokens
        if resumed:
            self.resumed += 1
            self.resumed_tokens += tokens
        for writer in self.writers:
            writer.put_sentence(line, source, record)
        if self.texts is not None:
            self.texts[line] = record.text if record else ""
        self.progress.add(0 if resumed else tokens)

    def write_finished(self) -> str:
        """After an interruption: write what is finished after unfinished lines too; returns what that is, in words."""
        gaps, *_ = [writer.write_finished() for writer in self.writers]
        of = f" of {self.total:,}" if self.total is not None else ""
        empty = f"; {gaps:,} empty lines between them are for unfinished sentences" if gaps else ""
        return f"{self.writer.count:,}{of} sentences were finished and are {self.where}{empty}"


class DecodeProgress:
    """A line on standard error, rewritten on a terminal, else a new one every LINE_SECONDS."""

    def __init__(self, total: int | None = None) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self.started = self.last = time.monotonic()
        self.on_terminal = sys.stderr.isatty()

    def add(self, tokens: int) -> None:
        """One more sentence, of so many tokens."""
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if now - self.last < (0.1 if self.on_terminal else LINE_SECONDS):
            return
        self.last, seconds = now, now - self.started
        of = "" if self.total is None else f" of {self.total:,}"
        start, end = ("\r\033[K", "") if self.on_terminal else ("", "\n")
        text = f"{start}{self.done:,}{of} sentences, {self.tokens / seconds:,.0f} tokens/s"
        print(text, end=end, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM for a moment, so that no line is half written or lost.

    Python's handlers are exchanged: a signal mask would not do, other threads of the process would get the signal.
    """
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda number, frame: received.append(number)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if received:
        raise KeyboardInterrupt
