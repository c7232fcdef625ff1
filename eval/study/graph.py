"""Steps of a study: commands with a key, each in a folder of its own, run once.

A step's key is the SHA-256 of its command. In it, a file of another step counts as that step's key and a file of the
user as its checksum, so the key changes with everything that decides the result and with nothing else (folders may
move). A step is done when `done.json` is in its folder. While a step runs, the runner and its command both hold a lock
on the folder: a second run waits, and a run that was killed resumes when its last command has ended.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from decode.pipeline.journal import folder_digest
from minillama.errors import InputError
from minillama.files import atomic_write

DONE = "done.json"
# Raise a kind's number when its command computes something else from the same arguments.
VERSIONS = {"data": 1, "tokenizer": 1, "model": 1, "cpt": 1, "sft": 1, "decode": 1, "score": 1, "fit": 1}


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a step writes, by its name in the step's folder."""

    step: "Step"
    name: str = "out"


@dataclass(frozen=True)
class Input:
    """A file of the user, or a model's folder, known by its contents."""

    path: Path


@dataclass(frozen=True)
class Text:
    """A small file made from the study's settings, written into the step's folder before the command runs."""

    name: str
    content: str


@dataclass(frozen=True)
class Named:
    """`NAME=` before an argument, as `--model` and `--prompt` take it."""

    name: str
    argument: "Argument"


Argument = str | Artifact | Input | Text | Named


@dataclass(frozen=True, eq=False)
class Step:
    """`python -m` with the arguments. `unkeyed` arguments do not change the result, such as the batch size.

    kind: one of VERSIONS.   processes: how many torchrun starts.   model, options: the model's label in the study and
    its training options, from which memory is predicted.
    """

    name: str
    kind: str
    arguments: tuple[Argument, ...]
    unkeyed: tuple[Argument, ...] = ()
    processes: int = 1
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> list["Step"]:
        plain = (word.argument if isinstance(word, Named) else word for word in (*self.arguments, *self.unkeyed))
        return list(dict.fromkeys(word.step for word in plain if isinstance(word, Artifact)))

    @cached_property
    def key(self) -> str:
        parts = [self.kind, VERSIONS[self.kind], *map(_identity, self.arguments)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name)
        return f"{plain}-{self.key[:10]}"


def _identity(argument: Argument) -> Any:
    """What an argument adds to the key, as JSON."""
    if isinstance(argument, Named):
        return ["named", argument.name, _identity(argument.argument)]
    if isinstance(argument, Artifact):
        return [argument.step.key, argument.name]
    if isinstance(argument, Input):
        folder = argument.path.is_dir()
        return ["folder", folder_digest(argument.path)] if folder else ["file", _checksum(argument.path)]
    if isinstance(argument, Text):
        return ["text", argument.content]
    return argument


def _checksum(path: Path) -> str:
    try:
        stat = path.stat()
        return _checksum_of(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data names the folder of a study's files") from None


@cache
def _checksum_of(path: Path, size: int, modified: int) -> str:
    """Read once for each state of the file: it is an input of many steps."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Store:
    """The folders of all steps, below WORK/steps."""

    work: Path

    def folder(self, step: Step) -> Path:
        return self.work / "steps" / step.folder_name

    def path(self, artifact: Artifact) -> Path:
        return self.folder(artifact.step) / artifact.name

    def is_done(self, step: Step) -> bool:
        return (self.folder(step) / DONE).is_file()

    def done(self, step: Step) -> dict[str, Any]:
        """The record that `finish` wrote."""
        return dict(json.loads((self.folder(step) / DONE).read_text(encoding="utf-8")))

    def state(self, step: Step) -> str:
        if self.is_done(step):
            return "done"
        return "begun" if self.folder(step).is_dir() else "to do"

    def command(self, step: Step) -> list[str]:
        """The command's words; writes the step's small files first."""
        return [self._format(step, argument) for argument in (*step.arguments, *step.unkeyed)]

    def _format(self, step: Step, argument: Argument) -> str:
        if isinstance(argument, Named):
            return f"{argument.name}={self._format(step, argument.argument)}"
        if isinstance(argument, Artifact):
            return str(self.path(argument))
        if isinstance(argument, Input):
            return str(argument.path)
        if isinstance(argument, Text):
            path = self.folder(step) / argument.name
            atomic_write(path, argument.content)
            return str(path)
        return argument.replace("{step}", str(self.folder(step)))

    def finish(self, step: Step, record: dict[str, Any]) -> None:
        record = {"name": step.name, "kind": step.kind, "key": step.key, **record}
        atomic_write(self.folder(step) / DONE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def locked(self, step: Step, on_wait: Callable[[], None]) -> Iterator[int]:
        """Hold the step's lock and yield its file descriptor; `on_wait()` is called once if another run holds it."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def in_order(targets: Sequence[Step]) -> list[Step]:
    """The targets and all steps that they need, inputs first; steps with equal keys become one."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in found:
            for before in step.inputs:
                visit(before)
            found[step.key] = step

    for step in targets:
        visit(step)
    return list(found.values())
