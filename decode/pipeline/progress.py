"""Progress of decoding: a bar on a terminal, a plain line now and then otherwise; always on standard error."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 30.0


class DecodeProgress:
    def __init__(self, total: int | None, quiet: bool = False, done: int = 0) -> None:
        """done: sentences that an earlier run finished; they count as done and not in the speed."""
        self.total, self.quiet = total, quiet
        self.done, self.tokens = done, 0
        self.started = self.last = time.monotonic()
        self.bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
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
        elif not self.quiet and now - self.last >= LINE_EVERY:
            self.last = now
            of = f" of {self.total:,}" if self.total is not None else ""
            print(f"{self.done:,}{of} sentences, {status}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
