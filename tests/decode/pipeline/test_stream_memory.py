"""Standard input of any length: memory is flat.

The slow test pipes COLLAB_STREAM_LINES lines (default 1,000,000; at most COLLAB_STREAM_SECONDS, default 900) through
one small model of the demo's and prints the curve: `pytest -m slow -s tests/decode/pipeline/test_stream_memory.py`.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from corpora import sample

DEMO = Path(__file__).resolve().parents[3] / "demo"


def peak_megabytes(pid: int) -> float:
    """The most memory that a process has held so far (VmHWM)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def short_lines():
    """Short lines without end, most of them different."""
    words = [sentence[start : start + 5] for sentence in sample().source for start in range(0, len(sentence), 3)]
    number = 0
    while True:
        yield f"{words[number % len(words)]}{number % 99991}\n".encode()
        number += 1


def peaks_of_a_stream(model, count, at, seconds, *extra):
    """{lines answered: peak in MB} of a run that is fed `count` lines, stopped after so many seconds."""
    argv = [sys.executable, "-m", "decode.collab", "--model", f"M={model}", "--source", "ja", "--target", "en"]
    argv += ["--input", "-", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:

        def feed():
            lines = short_lines()
            try:
                for _ in range(count):
                    process.stdin.write(next(lines))
                    if time.monotonic() - started > seconds:
                        break
                process.stdin.close()
            except BrokenPipeError:  # the run ended: what it said on standard error tells why
                pass

        feeder = threading.Thread(target=feed)
        feeder.start()
        found = {}
        answered = 0
        for _ in process.stdout:
            answered += 1
            if answered in at:
                found[answered] = peak_megabytes(process.pid)
                print(
                    f"{answered:>9,} lines {found[answered]:8.1f} MB  {time.monotonic() - started:6.0f} s", flush=True
                )
        feeder.join()
        assert process.wait(120) == 0
    return found, answered


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_memory_is_the_same_after_3000_lines_as_after_1500(model_folders):
    found, answered = peaks_of_a_stream(
        model_folders["A"], 3100, (1500, 3000), 600, "--max-new-tokens", "2", "--batch-size", "32"
    )
    assert answered == 3100
    assert found[3000] <= 1.05 * found[1500]


@pytest.mark.slow
def test_memory_is_the_same_after_a_million_lines_as_after_10000():
    count = int(os.environ.get("COLLAB_STREAM_LINES", "1000000"))
    seconds = float(os.environ.get("COLLAB_STREAM_SECONDS", "900"))
    at = {10_000, *range(50_000, count + 1, 50_000)}
    found, answered = peaks_of_a_stream(
        DEMO / "S_tgt", count, at, seconds, "--max-new-tokens", "2", "--batch-size", "64"
    )
    print(f"{answered:,} lines answered")
    assert answered >= 50_000
    assert max(found.values()) <= 1.05 * found[10_000]
