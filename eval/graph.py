"""Steps of a study: commands with a key, each in a folder of its own, done once.

A step's key is the SHA-256 of its command, in which a file of another step stands as that step's key and a file of
the user as its checksum: whatever decides a result decides the key, and nothing else does (folders may move). A step is
done when `done.json` is in its folder. While it runs its folder is locked, by the runner and by the command alike, so a
second run waits, and one that was killed can be gone on with once its last command has ended.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from decode.pipeline.fingerprint import folder_digest
from minillama.errors import InputError
from minillama.files import atomic_write

DONE = "done.json"
# Raised when what a command of this kind computes changes in a way its arguments do not show.
VERSIONS = {"data": 1, "tokenizer": 1, "model": 1, "cpt": 1, "sft": 1, "decode": 1, "score": 1, "fit": 1}


@dataclass(frozen=True)
class Out:
    """A file or folder that a step writes, by its name in the step's folder; "" is the folder itself."""

    step: "Step"
    name: str = "out"


@dataclass(frozen=True)
class File:
    """A file of the user's: known by its contents."""

    path: Path


@dataclass(frozen=True)
class Folder:
    """A model's folder of the user's: known by its contents."""

    path: Path


@dataclass(frozen=True)
class Text:
    """A small file made of the study's settings; it is written into the step's folder before the command runs."""

    name: str
    content: str


@dataclass(frozen=True)
class Named:
    """`NAME=` before a file or folder, as `--model` and `--prompt` want it."""

    name: str
    word: "Word"


Word = str | Out | File | Folder | Text | Named


@dataclass(frozen=True, eq=False)
class Step:
    """`python -m` of words; `own` are words that decide nothing of the result, such as the rows decoded at once.

    kind: data, tokenizer, model, cpt, sft, decode, score or fit.   slots: places it takes of those that there are.
    """

    name: str
    kind: str
    words: tuple[Word, ...]
    own: tuple[Word, ...] = ()
    slots: int = 1
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> list["Step"]:
        plain = (word.word if isinstance(word, Named) else word for word in (*self.words, *self.own))
        return list(dict.fromkeys(word.step for word in plain if isinstance(word, Out)))

    @cached_property
    def key(self) -> str:
        parts = [self.kind, VERSIONS[self.kind], *(_identity(word) for word in self.words)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name)
        return f"{plain}-{self.key[:10]}"


def _identity(word: Word) -> Any:
    if isinstance(word, Named):
        return ["named", word.name, _identity(word.word)]
    if isinstance(word, Out):
        return [word.step.key, word.name]
    if isinstance(word, File):
        return ["file", _checksum(word.path)]
    if isinstance(word, Folder):
        return ["folder", folder_digest(word.path)]
    if isinstance(word, Text):
        return ["text", word.content]
    return word


_CHECKSUMS: dict[tuple[Path, int, int], str] = {}


def _checksum(path: Path) -> str:
    try:
        stat = path.stat()
        known = (path, stat.st_size, stat.st_mtime_ns)
        if known not in _CHECKSUMS:
            with open(path, "rb") as stream:
                _CHECKSUMS[known] = hashlib.file_digest(stream, "sha256").hexdigest()
        return _CHECKSUMS[known]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data names the folder that a study's files lie in") from None


@dataclass(frozen=True)
class Store:
    """Folders of all steps below WORK/steps."""

    work: Path

    def folder(self, step: Step) -> Path:
        return self.work / "steps" / step.folder_name

    def path(self, out: Out) -> Path:
        return self.folder(out.step) / out.name

    def is_done(self, step: Step) -> bool:
        return (self.folder(step) / DONE).is_file()

    def done(self, step: Step) -> dict[str, Any]:
        """What `finish` wrote, and the command's files are there."""
        found: dict[str, Any] = json.loads((self.folder(step) / DONE).read_text(encoding="utf-8"))
        return found

    def state(self, step: Step) -> str:
        if self.is_done(step):
            return "done"
        return "begun" if self.folder(step).is_dir() else "to do"

    def command(self, step: Step, write: bool = True) -> list[str]:
        """The words of the command; small files are written first."""
        return [self._spell(step, word, write) for word in (*step.words, *step.own)]

    def _spell(self, step: Step, word: Word, write: bool) -> str:
        if isinstance(word, Named):
            return f"{word.name}={self._spell(step, word.word, write)}"
        if isinstance(word, Out):
            return str(self.path(word))
        if isinstance(word, (File, Folder)):
            return str(word.path)
        if isinstance(word, Text):
            path = self.folder(step) / word.name
            if write:
                atomic_write(path, word.content)
            return str(path)
        return word.replace("{step}", str(self.folder(step)))

    def finish(self, step: Step, record: dict[str, Any]) -> None:
        whole = {"name": step.name, "kind": step.kind, "key": step.key, **record}
        atomic_write(self.folder(step) / DONE, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def locked(self, step: Step, waiting: Any = None) -> Iterator[int]:
        """Hold the step's lock, which the command inherits; `waiting()` is called once where another run has it."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def in_order(wanted: Sequence[Step]) -> list[Step]:
    """All steps that the wanted ones need, each once, inputs first; equal ones (by key) become one."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key in found:
            return
        for before in step.inputs:
            visit(before)
        found[step.key] = step

    for step in wanted:
        visit(step)
    return list(found.values())
