"""How many cases the properties ran, added up over the processes that the tests run in."""

from collections import Counter
from typing import Any

import pytest

# property -> path -> how many
CASES: dict[str, Counter[str]] = {}


def count(what: str, path: str, number: int = 1) -> None:
    CASES.setdefault(what, Counter())[path] += number


class Totals:
    """pytest's hooks: with pytest-xdist a worker sends its counts home, and the summary shows the sum."""

    def pytest_sessionfinish(self, session: Any) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cases"] = {what: dict(counts) for what, counts in CASES.items()}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if CASES:
            terminalreporter.write_line("cases of the kernels' properties:")
        for what, counts in sorted(CASES.items()):
            ran = ", ".join(f"{number:,} {path}" for path, number in sorted(counts.items()))
            terminalreporter.write_line(f"  {what:45} {ran}")

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
    def pytest_testnodedown(self, node: Any) -> None:
        for what, counts in getattr(node, "workeroutput", {}).get("cases", {}).items():
            for path, number in counts.items():
                count(what, path, number)
