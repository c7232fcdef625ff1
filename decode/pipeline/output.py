"""Finished lines to files or standard output, in input order, each as soon as all before it are done; and progress.

`Outputs` writes all files of a run of decode.collab. It holds what waits for an earlier line, and the texts only where
references will be compared with them.

N-best lists are as Moses and Marian write them: `line ||| text ||| F0= log-probability ||| score`, best first, lines
from 0; F0 is the sum of the log-probabilities in nats, the score that sum normalised by length. A line that is blank or
was skipped has one empty entry with two zeros. A text may contain ` ||| ` itself: numbers follow the last two.
"""

import argparse
import json
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decode.pipeline.journal import journal_path
from decode.pipeline.record import Record
from minillama.errors import InputError

if TYPE_CHECKING:
    from decode.explain.page import PageWriter
    from decode.explain.text import TextWriter
    from decode.pipeline.members import EncodedInput

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
    try:
        if file.exists():
            with open(file, "ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def check_outputs(arguments: argparse.Namespace, processes: int) -> None:
    """Raise InputError for outputs that cannot be written or replace one another, and for what cannot be resumed."""
    for option in ("report", "details"):
        if getattr(arguments, option) == "-":
            raise InputError(f"--{option} -: give a file; standard output is for translations")
    others = [file for file in (arguments.input, arguments.reference) if file]
    explain = None if arguments.explain == "-" else arguments.explain
    for file in (arguments.output, arguments.report, arguments.details, nbest_path(arguments), explain):
        if file:
            check_writable(file, others)
            others.append(file)
    has_journal = arguments.input != "-" and journal_path(arguments.output) is not None
    if arguments.resume and not has_journal:
        raise InputError(
            "--resume: needs --input FILE and --output FILE; the journal is beside the output, and standard input "
            "cannot be read again"
        )
    if processes > 1 and not has_journal:
        raise InputError(
            f"{processes} processes share the sentences of a file and write one: give --input FILE and --output FILE, "
            "or run one process"
        )


def nbest_path(arguments: argparse.Namespace) -> str | None:
    """The file for n-best lists, None if none are requested; whether it can be written is not checked."""
    if not arguments.nbest:
        if arguments.nbest_output:
            raise InputError("--nbest-output has no effect without --nbest; give --nbest too")
        return None
    if arguments.nbest_output == "-":
        raise InputError("--nbest-output -: give a file; standard output is for translations")
    if arguments.nbest_output:
        return str(arguments.nbest_output)
    if arguments.output == "-" or (Path(arguments.output).exists() and not Path(arguments.output).is_file()):
        raise InputError("--nbest: with translations on standard output, name a file for the lists by --nbest-output")
    return f"{arguments.output}.nbest"


class OrderedWriter:
    """A context: `put(line, text)` in any order; lines are written in theirs. Lines count from 0, each is put once."""

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
        """Accept a finished line, a blank one with translated=False. An interruption waits until it is written."""
        with _uninterrupted():
            self.count += translated
            self.last = max(self.last, line) if translated else self.last
            self.waiting[line] = text
            self._write_ready()

    def write_finished(self) -> int:
        """After an interruption: write the lines after an unfinished one too, and that one empty.

        Returns the number of such empty lines.
        """
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
        # On the disk before a journal is removed.
        if self.path != "-" and stat.S_ISREG(os.fstat(self.stream.fileno()).st_mode):
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.stream.close()


class NBestWriter(OrderedWriter):
    """The n-best lists of each line's record; None for a line that is blank or was skipped."""

    def put_record(self, line: int, record: Record | None) -> None:
        entries = [f"{line} |||  ||| F0= 0 ||| 0"]
        if record is not None:
            entries = [f"{line} ||| {text} ||| F0= {total:.6f} ||| {score:.6f}" for text, total, score in record.nbest]
        self.put(line, "\n".join(entries), translated=record is not None)

    def write_finished(self) -> int:
        """After an interruption: write the lists after an unfinished line, which has no entry then."""
        self.stream.writelines(self.waiting.pop(line) + "\n" for line in sorted(self.waiting))
        return 0


class Outputs:
    """A context with every file of a run. `put` accepts lines in any order; a record that comes again is dropped."""

    def __init__(
        self, arguments: argparse.Namespace, file: "EncodedInput | None", explanations: "PageWriter | TextWriter | None"
    ) -> None:
        """file: the input, where it is not a stream. explanations: written in place of translations where both go to
        standard output.
        """
        path = os.devnull if arguments.explain == arguments.output == "-" else arguments.output
        self.where = "on standard output" if arguments.output == "-" else f"in {arguments.output}"
        self.total = None if file is None else len(file.texts)
        nbest = nbest_path(arguments)
        self.writer = OrderedWriter(path)
        self.details = OrderedWriter(arguments.details) if arguments.details else None
        self.nbest = NBestWriter(nbest) if nbest else None
        self.explanations = explanations
        self.texts: dict[int, str] | None = {} if arguments.reference else None
        self.tokens = self.resumed = self.resumed_tokens = 0
        self.progress: DecodeProgress | None = None
        self.files = ExitStack()

    def __enter__(self) -> "Outputs":
        for writer in (self.writer, self.details, self.nbest, self.explanations):
            if writer:
                self.files.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.files.__exit__(kind, error, trace)

    def put_empty(self, lines: Sequence[int]) -> None:
        """Lines that are blank or were skipped."""
        for line in lines:
            self._write(line, "", None)
            self._progress().add(0)

    def put(self, record: Record, source: str, resumed: bool = False) -> None:
        """source: the input's line.   resumed: an earlier run finished it."""
        if record.line < self.writer.next or record.line in self.writer.waiting:
            return
        self.tokens += len(record.tokens)
        if resumed:
            self.resumed += 1
            self.resumed_tokens += len(record.tokens)
        self._write(record.line, source, record)
        if not resumed:
            self._progress().add(len(record.tokens))

    def write_finished(self) -> str:
        """After an interruption: write the lines after unfinished ones too; says in words what was written."""
        gaps = self.writer.write_finished()
        for writer in (self.nbest, self.explanations):
            if writer:
                writer.write_finished()
        of = f" of {self.total:,}" if self.total is not None else ""
        empty = f"; {gaps:,} empty lines between them stand for unfinished sentences" if gaps else ""
        return f"{self.writer.count:,}{of} sentences were finished and are {self.where}{empty}"

    def _write(self, line: int, source: str, record: Record | None) -> None:
        text = record.text if record else ""
        self.writer.put(line, text, translated=record is not None)
        if self.details:
            entry = record.to_json() if record else {"line": line + 1, "text": "", "tokens": [], "logprobs": []}
            self.details.put(line, json.dumps(entry, ensure_ascii=False))
        if self.nbest:
            self.nbest.put_record(line, record)
        if self.explanations:
            self.explanations.put_sentence(line, source, record)
        if self.texts is not None:
            self.texts[line] = text

    def _progress(self) -> "DecodeProgress":
        if self.progress is None:
            self.progress = DecodeProgress(self.total, done=self.resumed)
        return self.progress


class DecodeProgress:
    """A bar on a terminal, a plain line now and then otherwise; on standard error."""

    def __init__(self, total: int | None, done: int = 0) -> None:
        """done: sentences that an earlier run finished; they count as done but not in the speed."""
        self.total, self.done, self.tokens = total, done, 0
        self.started = self.last = time.monotonic()
        self.bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=total, completed=done, status="")
            self.bar.start()

    def add(self, tokens: int) -> None:
        """One more sentence, of so many tokens."""
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        status = f"{self.tokens / max(now - self.started, 1e-9):,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, status=status)
        elif now - self.last >= LINE_SECONDS:
            self.last = now
            of = f" of {self.total:,}" if self.total is not None else ""
            print(f"{self.done:,}{of} sentences, {status}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM for a moment, so that no line is half written or lost.

    Python's handlers are exchanged: a signal mask would not do, other threads of the process would get the signal.
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
