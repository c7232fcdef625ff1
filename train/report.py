"""Progress of a run for whoever watches: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines where there is no terminal.
LINE_EVERY = 30.0


class Reporter:
    """Shows loss (smoothed over about 50 steps), tokens per second, the share of target tokens, and the time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.smooth: float | None = None

    def start(self, step: int, total: int) -> None:
        self.total, self.first = total, step
        self.started = self.last_line = time.monotonic()
        self.tokens = self.targets = 0
        if self.console.is_terminal:
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
        elif now - self.last_line >= LINE_EVERY or step == self.total:
            self.last_line = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {self._status(now)}  {left:,.0f} s left", file=sys.stderr, flush=True)

    def validation(self, step: int, loss: float, best: float) -> None:
        mark = "  (best)" if loss <= best else ""
        self.console.print(f"step {step}: validation loss {loss:.4f}{mark}", highlight=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _status(self, now: float) -> str:
        speed = self.tokens / max(now - self.started, 1e-9)
        share = self.targets / max(self.tokens, 1)
        return f"loss {self.smooth:.4f}  {speed:,.0f} tokens/s  {share:.0%} targets"
