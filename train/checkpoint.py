"""Checkpoints of a running training, and the finished model: each appears whole or not at all.

OUTPUT/metrics.jsonl            what the run computed, one line a step or validation
OUTPUT/checkpoints/step-N/      weights, optimizer, position: all that decides the next step
OUTPUT/config.json, model.safetensors, tokenizer.json, prompt.toml, run.json    the finished model, config.json last
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillama.errors import InputError
from minillama.files import atomic_folder, sync

STATE = "state.pt"


@dataclass
class Progress:
    """Where a run stands. `metrics_bytes` is metrics.jsonl's length at this step: a resumed run rewrites the rest."""

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    stale: int = 0
    stopped: bool = False
    metrics_bytes: int = 0


def save_checkpoint(output: Path, progress: Progress, state: dict[str, Any]) -> None:
    """Write OUTPUT/checkpoints/step-N, then drop the ones before it."""
    folder = output / "checkpoints"
    with atomic_folder(folder / f"step-{progress.step:08d}") as temporary:
        torch.save({"progress": vars(progress), **state}, temporary / STATE)
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def load_checkpoint(output: Path) -> tuple[Progress, dict[str, Any]] | None:
    """The last checkpoint of a run, or None when there is none yet."""
    found = _checkpoints(output / "checkpoints")
    if not found:
        return None
    path = found[-1] / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: the checkpoint is damaged ({reason}); remove {found[-1]} to start again") from None
    return Progress(**state.pop("progress")), state


def finish(output: Path, write: Callable[[Path], None]) -> None:
    """Move what `write` makes into OUTPUT, config.json last (a folder without it is no model); drop checkpoints."""
    temporary = Path(tempfile.mkdtemp(prefix=".finished.", dir=output))
    try:
        write(temporary)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == "config.json")
        for file in files:
            sync(file)
        for file in files:
            os.replace(file, output / file.name)
        sync(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
