"""Checkpoints of a run, and its finished model: each is written atomically.

OUTPUT/metrics.jsonl            what the run computed, one line per step or validation
OUTPUT/checkpoints/step-N/      everything that decides the next step, in torch.distributed.checkpoint's format:
    __RANK_0.distcp, .metadata  weights, optimizer state, generator, written by all ranks, readable by any number
    state.json                  step, epoch, position, the best so far, metrics.jsonl's length, the settings
    manifest.json               SHA-256 and size of each of the above
OUTPUT/config.json, model.safetensors, tokenizer.json, prompt.toml, run.json    the finished model, config.json last

Saving copies the tensors to the host and writes them in a thread while training continues. The folder is written under
another name, synced, and renamed. The last K are kept, and the best by validation that each of these refers to.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from minillama.errors import InputError
from minillama.files import sync
from train.distributed import DistributedContext

STATE, MANIFEST = "state.json", "manifest.json"
# The file of a finished folder, a model's or an adapter's, that is written last.
LAST_FILES = ("config.json", "adapter_config.json")


@dataclass
class Progress:
    """The state of a run after `step`. A resumed run truncates metrics.jsonl to `metrics_bytes`.

    stale: validations since the best one.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    validated_step: int = 0
    stale: int = 0
    stopped: bool = False
    metrics_bytes: int = 0
    recent_norms: list[float] = field(default_factory=list)


class Writer(dcp.FileSystemWriter):
    """Records why this rank could not write: dcp.save's own exception may not contain the cause."""

    failure: BaseException | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            self.failure = error
            raise


class Checkpoints:
    """The checkpoints of one run in `folder`. All ranks call `save`, `wait`, `newest` and `load` together."""

    def __init__(self, folder: Path, keep: int, world: DistributedContext) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.saved_step = 0
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group

    def save(self, progress: Progress, fingerprint: dict[str, Any], tensors: dict[str, Tensor], wait: bool) -> None:
        """Write step-N in a thread, from a copy on the host. Unless `wait`, the next call raises its failure.

        Raises InputError if it cannot be written; earlier checkpoints are then intact.
        """
        self.wait()
        record = json.dumps({"progress": vars(progress), "fingerprint": fingerprint}, indent=1)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        # not a daemon: an interpreter that ends normally waits for the file
        self.thread = threading.Thread(target=self._write, args=(progress.step, record, copies), name="checkpoint")
        self.thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the last save; raises what it raised."""
        self.join()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def join(self) -> None:
        """Wait until no file is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def newest(self) -> dict[str, Any] | None:
        """state.json of the last intact checkpoint, or None if there is no checkpoint.

        A damaged one is named on standard error and the one before it is used. Raises InputError if all are damaged.
        """
        found = self.world.on_main(self._newest)
        if found is not None:
            self.saved_step = found["progress"]["step"]
        return found

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from step-N, whatever the number of ranks that wrote it."""
        reader = dcp.FileSystemReader(self.path(step))
        dcp.load(tensors, storage_reader=reader, process_group=self.world.files, no_dist=self.world.size == 1)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _newest(self) -> dict[str, Any] | None:
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self._steps()
        for step in reversed(steps):
            try:
                found = _verified(self.path(step))
                best = found["progress"]["best_step"]
                if best and best != step:
                    _verified(self.path(best))
                for damaged in steps[steps.index(step) + 1 :]:  # it must not count as one of those that are kept
                    os.rename(self.path(damaged), self.folder / f".{self.path(damaged).name}.old")
                return found
            except InputError as error:
                self.world.log(f"{error}; using the checkpoint before it")
        if steps:
            raise InputError(f"{self.folder}: no checkpoint is intact; remove the folder to start again")
        return None

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))

    def _write(self, step: int, record: str, tensors: dict[str, Tensor]) -> None:
        """Never raises: the failure is stored for `wait`, the same on all ranks."""
        problem = None  # of this rank: the system's reason if there is one, and the traceback
        temporary = self.folder / f".{self.path(step).name}.tmp"
        writer = Writer(temporary, sync_files=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.world.files, no_dist=self.world.size == 1)
            if self.world.is_main:
                self._publish(step, record, temporary)
        except (Exception, CheckpointException) as error:
            problem = _system_reason(error) or _system_reason(writer.failure), traceback.format_exc()
        problems = [found for found in self.world.gather(problem) if found is not None]
        if not problems:
            self.saved_step = step
            return
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = next((reason for reason, _ in problems if reason), None)
        if reason is None:
            self.failure = RuntimeError(problems[0][1])
            return
        earlier = f"the one of step {self.saved_step} is intact" if self.saved_step else "there is no earlier one"
        self.failure = InputError(
            f"{self.path(step)}: the checkpoint could not be written ({reason}); {earlier}: "
            "fix this and repeat the command with --resume"
        )

    def _publish(self, step: int, record: str, temporary: Path) -> None:
        (temporary / STATE).write_text(record + "\n", encoding="utf-8")
        paths = sorted(temporary.iterdir())
        files = {path.name: {"sha256": digest_of(path), "bytes": path.stat().st_size} for path in paths}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
        for name in (STATE, MANIFEST, "."):
            sync(temporary / name)
        final = self.path(step)
        if final.exists():  # of the same step, from before this run was resumed at an earlier one
            os.rename(final, self.folder / f".{final.name}.old")
        os.rename(temporary, final)
        sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Rename each folder before removing it, so that a kill leaves no partial checkpoint under its name."""
        steps = self._steps()
        states = [json.loads((self.path(step) / STATE).read_text(encoding="utf-8")) for step in steps[-self.keep :]]
        keep = {state["progress"][name] for state in states for name in ("step", "best_step")}
        for step in set(steps) - keep:
            os.rename(self.path(step), self.folder / f".{self.path(step).name}.old")
        for leftover in self.folder.glob(".step-*.old"):
            shutil.rmtree(leftover, ignore_errors=True)


def finish(output: Path, write: Callable[[Path], None]) -> None:
    """Move the files that `write` makes into OUTPUT, config.json last: without it a folder is no model."""
    temporary = output / ".finished"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        write(temporary)
        files = sorted(temporary.iterdir(), key=lambda path: path.name in LAST_FILES)
        for file in files:
            sync(file)
        for file in files:
            os.replace(file, output / file.name)
        sync(output)
    except Exception as error:
        if (reason := _system_reason(error)) is None:
            raise
        raise InputError(
            f"{output}: the finished model could not be written ({reason}); the last checkpoint is intact: "
            "fix this and repeat the command with --resume"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(output: Path) -> bool:
    return any((output / name).exists() for name in LAST_FILES)


def _verified(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, whose files must match the manifest; otherwise InputError names the file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                raise InputError(f"{file}: damaged ({file.stat().st_size:,} bytes, {entry['bytes']:,} were written)")
            if digest_of(file) != entry["sha256"]:
                raise InputError(f"{file}: damaged (its SHA-256 is not the manifest's)")
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = _system_reason(error) or str(error).split("\n")[0]
        raise InputError(f"{path}: damaged ({reason})") from None


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _system_reason(error: BaseException | None) -> str | None:
    """The operating system's reason for a failed write, from within the exceptions that wrap it; None: no such."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error is None:
        return None
    failures = getattr(error, "failures", {})  # torch.distributed.checkpoint's, by rank
    inner = [error.__cause__, error.__context__, *(failure for failure, _ in failures.values())]
    return next((reason for some in inner if (reason := _system_reason(some))), None)
