"""The records of a run (metrics.jsonl, timing.jsonl, TensorBoard) and its progress on standard error.

metrics.jsonl holds what was computed, so it has the same bytes in two runs with the same weights; timing.jsonl holds
seconds and memory. Progress is a line: renewed on a terminal, otherwise printed every LINE_SECONDS.
"""

import json
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minillama.errors import InputError

LINE_SECONDS = 30.0


class JsonLines:
    """A file of JSON lines, truncated to its first `keep` bytes. Raises InputError if it cannot be written.

    Every line is flushed at once, so another process can follow the file.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < keep:
            raise InputError(f"{path}: {size:,} bytes, but the checkpoint was saved with {keep:,}; cannot resume")
        with self._writing():
            self.stream = open(path, "r+b" if keep else "wb")  # noqa: SIM115 (closed by `close`)
            self.stream.truncate(keep)
            self.stream.seek(keep)

    def write(self, record: dict[str, Any]) -> None:
        with self._writing():
            self.stream.write((json.dumps(record) + "\n").encode())
            self.stream.flush()

    def sync(self) -> int:
        """Wait until all bytes are on the disk; returns their number."""
        with self._writing():
            os.fsync(self.stream.fileno())
        return self.stream.tell()

    def close(self) -> None:
        with self._writing():
            self.stream.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); the last checkpoint is intact: fix this and "
                "repeat the command with --resume"
            ) from None


class Records:
    """metrics.jsonl, truncated to `metrics_bytes`; timing.jsonl; with `tensorboard` its scalars. `step`: the last one.

    timing.jsonl has seconds, speed and peak memory so far of each step.
    """

    def __init__(self, output: Path, metrics_bytes: int, step: int, device: torch.device, tensorboard: bool) -> None:
        self.metrics = JsonLines(output / "metrics.jsonl", metrics_bytes)
        timing = output / "timing.jsonl"
        # a killed process may have left half a line
        self.timing = JsonLines(timing, timing.read_bytes().rfind(b"\n") + 1 if step and timing.exists() else 0)
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard: the package is not installed; pip install tensorboard") from None
            # what a killed run wrote after the last checkpoint is dropped
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.device, self.last = device, time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """Write what a training step or a validation computed, and of a training step its time."""
        self.metrics.write(record)
        for name in ("loss", "valid_loss", "grad_norm", "lr"):
            if self.board is not None and name in record:
                self.board.add_scalar(name, record[name], record["step"])
        if "loss" in record:
            now = time.monotonic()
            seconds, self.last = max(now - self.last, 1e-9), now
            self.timing.write(
                {
                    "step": record["step"],
                    "time": round(time.time(), 3),
                    "seconds": round(seconds, 6),
                    "tokens_per_second": round(record["tokens"] / seconds, 1),
                    "targets_per_second": round(record["targets"] / seconds, 1),
                    "peak_bytes": peak_bytes(self.device),
                }
            )

    def close(self) -> None:
        for writer in (self.metrics, self.timing, self.board):
            if writer is not None:
                writer.close()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident (getrusage) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Shows the loss (smoothed over about 50 steps), tokens per second and the time left."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(stderr=True, quiet=silent)
        self.status = self.console.status("")

    def start(self, step: int, total: int) -> None:
        self.total, self.first = total, step
        self.started = self.last_line = time.monotonic()
        self.tokens, self.smooth = 0, math.nan
        if self.console.is_terminal:
            self.status.start()

    def step(self, step: int, loss: float, tokens: int) -> None:
        self.tokens += tokens
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        left = seconds / (step - self.first) * (self.total - step)
        speed = f"{self.tokens / seconds:,.0f} tokens/s"
        line = f"step {step}/{self.total}  loss {self.smooth:.4f}  {speed}  {left:,.0f} s left"
        if self.console.is_terminal:
            self.status.update(line)
        elif now - self.last_line >= LINE_SECONDS or step == self.total:
            self.last_line = now
            self.note(line)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self.status.stop()
