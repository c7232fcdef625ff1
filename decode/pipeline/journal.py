"""Finished sentences, safe beside the output until the output is whole: `hyp.txt.journal`, `hyp.txt.journal.rank1` …

Lines of JSON, a file for each process that translates. The head says which run this is (decode/fingerprint.py), a
record is a sentence: line number from 1, text, tokens, log-probabilities in nats, why it ended. The last entry of a
rank that came to its end is a summary.

A record is one write at the end of the file, made when its sentence ends: a killed process loses nothing that was
finished. The file is synced every two seconds, so a machine that stops loses two seconds. Whatever follows the last
whole line (torn by a full disk, or zeros after a power cut) counts as not written. The writer holds a lock on its file,
so that two runs never write one output. Nothing here is held in memory: records are read as they are used.
"""

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode.pipeline.fingerprint import differences
from minillama import InputError
from minillama.files import sync

FORMAT = 1
SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Record:
    """One finished sentence; `line` counts from 0. `finished`: "stop" or "length".

    nbest: what was listed for it, best first: text, log-probability in nats, score.   explanations: the fields of each
    token's `decode.engine.attribution.Explanation`, that of the stop token behind them.
    """

    line: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str
    nbest: Sequence[Sequence[Any]] = ()
    explanations: Sequence[Sequence[Any]] = ()

    def entry(self) -> dict[str, Any]:
        """The record as a JSON object. Python writes floats so that they read back as the same bits."""
        entry = {**vars(self), "line": self.line + 1}
        return {name: value for name, value in entry.items() if value or name not in ("nbest", "explanations")}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Record":
        return cls(**{**entry, "line": entry["line"] - 1})


def journal_path(output: str) -> Path | None:
    """Where the journal of an output stands; None for what is no regular file, or where no file can be made."""
    path = Path(output)
    if output == "-" or (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        return None
    return path.with_name(path.name + ".journal")


def part_path(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


class Part:
    """A journal file open for appending, locked. Raises InputError where it cannot be written or another run has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.synced = time.monotonic()
        self._open()
        self.empty = os.fstat(self.descriptor).st_size == 0

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def restart(self, run: Mapping[str, Any], keep: int = 0) -> None:
        """Cut the file to its first `keep` bytes; an empty one gets a head."""
        os.ftruncate(self.descriptor, keep)
        self.empty = keep == 0
        if keep == 0:
            self._append({"journal": FORMAT, "run": dict(run)})
            sync(self.path.parent)

    def write(self, record: Record) -> None:
        self._append(record.entry())
        self.empty = False
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def end(self, summary: Mapping[str, Any]) -> None:
        """The last entry: this process has nothing more to write."""
        self._append({"end": dict(summary)})
        self.empty = False
        self.sync()

    def sync(self) -> None:
        os.fsync(self.descriptor)
        self.synced = time.monotonic()

    def close(self) -> None:
        """Sync and unlock. A journal without a single record has nothing to resume and is removed."""
        if self.empty:
            self.path.unlink(missing_ok=True)
        self.sync()
        os.close(self.descriptor)

    def _open(self) -> None:
        path = self.path
        while True:
            try:
                self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise InputError(f"{path}: cannot be written ({error.strerror})") from None
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self.descriptor)
                raise InputError(f"{path}: another run is writing this output now; wait for it or end it") from None
            except OSError:  # a file system without locks
                return
            if path.exists() and os.path.samestat(os.fstat(self.descriptor), os.stat(path)):
                return
            os.close(self.descriptor)  # its last owner removed it while we waited for the lock

    def _append(self, entry: Mapping[str, Any]) -> None:
        data = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); --resume goes on from it") from None


def begin(path: Path, run: Mapping[str, Any], resume: bool | None) -> tuple[Part, set[int]]:
    """Open the journal of a run and bring all that an earlier one left into this one file; returns the lines it has.

    resume: True goes on from what is there, False drops it, None raises InputError if there is anything to lose. Raises
    InputError too for the journal of a run that differs, naming the differences. Safe to be killed at any moment.
    """
    part = Part(path)
    try:
        others = [Path(name) for name in sorted(glob.glob(f"{glob.escape(str(path))}.rank*"))]
        for other in others:
            os.close(Part(other).descriptor)  # raises if a rank of another run still writes
        found = {file: _scan(file) for file in (path, *others)}
        done: set[int] = set().union(*(lines for _, _, lines in found.values())) if resume is not False else set()
        if done and resume is None:
            raise InputError(
                f"{path}: {len(done):,} finished sentences of a run that did not end; --resume goes on from there, "
                "--no-resume starts afresh"
            )
        if done:
            for file, (head, _, lines) in found.items():
                if lines and (different := differences(head, run)):
                    raise InputError(f"{file} is of another run: {different}; --no-resume starts afresh")
        own = found[path]
        part.restart(run, own[1] if done and own[2] else 0)
        for file in others:
            if done:
                for record in records(file):
                    part.write(record)
                part.sync()
            file.unlink()
    except BaseException:
        part.close()
        raise
    return part, done


def records(path: Path) -> Iterator[Record]:
    """The sentences of a journal file, in the order in which they ended."""
    for _, entry in entries(path):
        if "line" in entry:
            yield Record.of(entry)


def remove(path: Path) -> None:
    """The output is whole: the journal has done its work."""
    for name in glob.glob(f"{glob.escape(str(path))}.rank*"):
        os.unlink(name)
    path.unlink(missing_ok=True)


class Tail:
    """The journal of another process, read while it grows. `summary` is what it said at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.summary: dict[str, Any] | None = None

    def new(self) -> Iterator[Record]:
        for end, entry in entries(self.path, self.offset):
            if "line" in entry:
                yield Record.of(entry)
            self.summary = entry.get("end", self.summary)
            self.offset = end


def entries(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind it, entry) of each whole line; ends before the first that is torn or damaged, or has no file."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        stream.seek(offset)
        for raw in stream:
            try:
                entry = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(entry, dict):
                return
            offset += len(raw)
            yield offset, entry


def _scan(path: Path) -> tuple[dict[str, Any], int, set[int]]:
    """(what the head says of the run, bytes that are whole, lines that are finished). Without a head there is none."""
    run: dict[str, Any] = {}
    whole = 0
    lines: set[int] = set()
    for end, entry in entries(path):
        whole = end
        if entry.get("journal") == FORMAT:
            run = entry.get("run", {})
        elif "line" in entry:
            lines.add(entry["line"] - 1)
    return run, whole, lines
