"""The journal: finished sentences in a file beside the output until that is complete: `hyp.txt.journal`, `….rank1` …

Lines of JSON, one file per process that translates. The head has the run's fingerprint, each other line is a `Record`.

A record is one write, made when its sentence ends, so a killed process loses nothing that was finished. The file is
synced every two seconds, so a machine that stops loses two seconds. Anything after the last complete line (torn by a
full disk, or zeros after a power cut) counts as not written. The writer locks its file, so two runs never write one
output. Records are read as they are used, not held in memory.
"""

import fcntl
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decode.pipeline.config import Options
from minillama.errors import InputError
from minillama.files import sync

if TYPE_CHECKING:
    from decode.pipeline.members import EnsembleSpec

FORMAT = 1
SYNC_SECONDS = 2.0
# Options that do not change a translation: a run may be resumed with another batch size or number of processes.
WITHOUT_EFFECT = {"batch_size", "speculate"}
# A weight file is identified by its size and this many blocks spread over it: training changes every weight, and
# reading all of a large model twice would double the time to start.
BLOCKS, BLOCK_BYTES = 256, 4096


def journal_path(output: str) -> Path | None:
    """The path of an output's journal; None for what is no regular file, or in a folder that takes no new file."""
    path = Path(output)
    if output == "-" or (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        return None
    return path.with_name(path.name + ".journal")


def rank_path(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def rank_files(path: Path) -> list[Path]:
    """The files of ranks other than 0 that are there, of this run or an earlier one."""
    return [Path(name) for name in sorted(glob.glob(f"{glob.escape(str(path))}.rank*"))]


def remove_journal(path: Path) -> None:
    """The output is complete: the journal is no longer needed."""
    for file in (*rank_files(path), path):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Record:
    """A finished sentence. line: from 0.   logprobs: in nats, one for each token.   finished: "stop" or "length".

    nbest: the hypotheses listed for it, best first: text, log-probability in nats, score.   explanations: the fields of
    each token's `decode.engine.attribution.Explanation`; after a "stop" the last is the stop token's.
    """

    line: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str
    nbest: Sequence[Sequence[Any]] = ()
    explanations: Sequence[Sequence[Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, lines from 1. Python writes floats so that they read back as the same bits."""
        entry = {**vars(self), "line": self.line + 1}
        return {name: value for name, value in entry.items() if value or name not in ("nbest", "explanations")}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Record":
        return cls(**{**entry, "line": entry["line"] - 1})


class Journal:
    """A journal file open for appending, and locked: a context.

    Raises InputError where it cannot be written or another run has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        while not self._has_its_name():  # its last owner removed it before we had the lock
            os.close(self.descriptor)
            self._open()
        self.synced = time.monotonic()

    def _open(self) -> None:
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise InputError(f"{self.path}: another run is writing this output now; wait for it or end it") from None
        except OSError:  # a file system without locks
            pass

    def _has_its_name(self) -> bool:
        """Whether the path still leads to the file that is open."""
        return self.path.exists() and os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        """Sync and unlock. A journal without a record has nothing to resume and is removed."""
        if self._has_its_name() and next(read_records(self.path), None) is None:
            self.path.unlink(missing_ok=True)
        os.fsync(self.descriptor)
        os.close(self.descriptor)

    def open_run(self, run: Mapping[str, Any], resume: bool | None) -> set[int]:
        """The lines that an earlier run finished, in this file or another rank's; then `start`.

        resume: True continues that run, False drops it, None raises InputError if there is anything to lose. Raises
        InputError too for the journal of a different run, naming the differences. Safe to be killed at any moment.
        """
        if resume is False:
            os.ftruncate(self.descriptor, 0)
            for file in rank_files(self.path):
                file.unlink()
        done: set[int] = set()
        for file in (self.path, *rank_files(self.path)):
            reader = JournalReader(file)
            lines = {record.line for record in reader.new_records()}
            if lines and resume and (different := differences(reader.run, run)):
                raise InputError(f"{file} is of another run: {different}; --no-resume starts afresh")
            if not lines and file != self.path:
                file.unlink()
            done |= lines
        if done and resume is None:
            raise InputError(
                f"{self.path}: {len(done):,} finished sentences of a run that did not end; --resume continues it, "
                "--no-resume starts afresh"
            )
        self.start(run)
        return done

    def start(self, run: Mapping[str, Any]) -> None:
        """Drop a damaged end; write the head of a file without records."""
        reader = JournalReader(self.path)
        if sum(1 for _ in reader.new_records()):
            os.ftruncate(self.descriptor, reader.offset)
            return
        os.ftruncate(self.descriptor, 0)
        self._append({"journal": FORMAT, "run": dict(run)})
        sync(self.path.parent)

    def write(self, record: Record) -> None:
        self._append(record.to_json())
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            os.fsync(self.descriptor)
            self.synced = time.monotonic()

    def _append(self, entry: Mapping[str, Any]) -> None:
        data = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); --resume continues from it") from None


class JournalReader:
    """Reads a journal file, perhaps of another process and while it grows, as far as its lines are complete.

    run: the fingerprint in its head.   offset: bytes read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.run: dict[str, Any] = {}

    def new_records(self) -> Iterator[Record]:
        """The records since the last call; ends before a line that is torn or damaged."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            for raw in stream:
                try:
                    entry = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    return
                self.offset += len(raw)
                if entry.get("journal") == FORMAT:
                    self.run = entry.get("run", {})
                elif "line" in entry:
                    yield Record.from_json(entry)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a journal file, in the order in which their sentences ended."""
    return JournalReader(path).new_records()


def fingerprint(sentences: Sequence[str], models: "EnsembleSpec", options: Options) -> dict[str, Any]:
    """Names and values of all that decides the translations; folders by their contents, not by their paths."""
    found: dict[str, Any] = {"input": f"{len(sentences)} lines, {_digest(line.encode() for line in sentences)}"}
    found |= {name: value for name, value in asdict(options).items() if name not in WITHOUT_EFFECT}
    folders = {folder: folder_digest(folder) for folder in {member.folder for member in models.members}}
    for member in models.members:
        name, placement = member.name, models.placements[member.name]
        found |= {
            f"model {name}": folders[member.folder],
            f"weight of {name}": models.weights[name],
            f"prompt of {name}": _digest([repr(member.prompt.templates).encode()]),
            f"chat of {name}": member.chat.name,
            f"dtype of {name}": placement.weight_dtype,
            f"device of {name}": placement.device.type,
        }
        if placement.tp_size > 1:
            found[f"processes that share {name}"] = placement.tp_size
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The differences between two fingerprints, in words; empty when there are none."""
    return ", ".join(
        f"{name} was {there.get(name, 'not there')}, is {here.get(name, 'not there')}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    )


def folder_digest(folder: Path) -> str:
    """A digest of a model's folder: small files in full, weights by size and sample."""
    pieces = []
    for file in sorted(folder.iterdir()):
        weights = file.suffix in (".safetensors", ".pth")
        if weights or file.name in ("config.json", "generation_config.json", "params.json") or "token" in file.name:
            size = file.stat().st_size
            pieces.append(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                if not weights or size <= BLOCKS * BLOCK_BYTES:
                    pieces.append(stream.read())
                else:
                    for block in range(BLOCKS):
                        stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                        pieces.append(stream.read(BLOCK_BYTES))
    return _digest(pieces)


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]
