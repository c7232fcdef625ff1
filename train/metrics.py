"""The records of a run (metrics.jsonl, timing.jsonl, TensorBoard) and its progress on standard error.

metrics.jsonl holds what was computed, so it has the same bytes in two runs with the same weights; timing.jsonl holds
seconds and memory. Progress is a bar on a terminal, otherwise a line every LINE_SECONDS.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        try:
            self.stream = open(path, "r+b" if keep else "wb")  # noqa: SIM115 (closed by `close`)
            self.stream.truncate(keep)
            self.stream.seek(keep)
        except OSError as error:
            raise self._write_error(error) from None

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.stream.write((json.dumps(record) + "\n").encode())
            self.stream.flush()
        except OSError as error:
            raise self._write_error(error) from None

    def sync(self) -> int:
        """Wait until all bytes are on the disk; returns their number."""
        try:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            return self.stream.tell()
        except OSError as error:
            raise self._write_error(error) from None

    def close(self) -> None:
        try:
            self.stream.close()
        except OSError as error:
            raise self._write_error(error) from None

    def _write_error(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror}); the last checkpoint is intact: fix this and repeat "
            "the command with --resume"
        )


class Timing:
    """timing.jsonl: seconds, speed and peak memory so far of each step."""

    def __init__(self, output: Path, resumed: bool, device: torch.device) -> None:
        path = output / "timing.jsonl"
        # a killed process may have left half a line
        self.lines = JsonLines(path, path.read_bytes().rfind(b"\n") + 1 if resumed and path.exists() else 0)
        self.device = device
        self.last = time.monotonic()

    def step(self, step: int, tokens: int, targets: int) -> None:
        now = time.monotonic()
        seconds, self.last = max(now - self.last, 1e-9), now
        self.lines.write(
            {
                "step": step,
                "time": round(time.time(), 3),
                "seconds": round(seconds, 6),
                "tokens_per_second": round(tokens / seconds, 1),
                "targets_per_second": round(targets / seconds, 1),
                "peak_bytes": peak_bytes(self.device),
            }
        )

    def close(self) -> None:
        self.lines.close()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident (getrusage) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def tensorboard_writer(output: Path, first_step: int) -> Any:
    """A SummaryWriter that drops what a killed run wrote from `first_step` on. Raises InputError if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard: the package is not installed; pip install tensorboard") from None
    return SummaryWriter(str(output / "tensorboard"), purge_step=first_step)


class Reporter:
    """Shows the loss (smoothed over about 50 steps), tokens per second, the share of target tokens, the time left."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(stderr=True, quiet=silent)
        self.silent = silent
        self.bar: Progress | None = None
        self.smooth: float | None = None

    def start(self, step: int, total: int) -> None:
        self.total, self.first = total, step
        self.started = self.last_line = time.monotonic()
        self.tokens = self.targets = 0
        if self.console.is_terminal and not self.silent:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step, status="")
            self.bar.start()

    def step(self, step: int, loss: float, tokens: int, targets: int) -> None:
        self.tokens += tokens
        self.targets += targets
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, status=self._status(now))
        elif not self.silent and (now - self.last_line >= LINE_SECONDS or step == self.total):
            self.last_line = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {self._status(now)}  {left:,.0f} s left", file=sys.stderr, flush=True)

    def validation(self, step: int, loss: float, best: float) -> None:
        mark = "  (best)" if loss <= best else ""
        self.note(f"step {step}: validation loss {loss:.4f}{mark}")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _status(self, now: float) -> str:
        speed = self.tokens / max(now - self.started, 1e-9)
        share = self.targets / max(self.tokens, 1)
        return f"loss {self.smooth:.4f}  {speed:,.0f} tokens/s  {share:.0%} targets"
