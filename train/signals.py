"""SIGINT and SIGTERM while a model trains: the step in hand is finished, saved, and only then does the run end."""

import signal
import threading
import time
from types import FrameType
from typing import Any

# A terminal's Ctrl-C reaches every process of its group, and torchrun passes it on once more: within this many seconds
# a second signal is the same wish.
SAME_WISH = 1.0


class StopRequest:
    """Inside the block the first signal sets `made`; a later one interrupts at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.made = False
        self.at = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self.before[kind] = signal.signal(kind, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.made and now - self.at > SAME_WISH:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self.at = True, now
