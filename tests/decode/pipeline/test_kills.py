"""20 kills at random moments of a run of 500 sentences of the demo, one rank of two in five of them: nothing is lost.

    pytest -m slow -s tests/decode/pipeline/test_kills.py

COLLAB_KILLS changes the number, COLLAB_KILL_INPUT names a file of Japanese sentences (default: 500 made of the sample),
COLLAB_KILL_SEED repeats a run. The quick version, with random models, is in test_resume.py and test_distributed.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpora import sample
from decode.pipeline.journal import rank_path, read_records

DEMO = Path(__file__).resolve().parents[3] / "demo"
SAMPLE = sample().source
SENTENCES = [*SAMPLE, *(f"{first}{second}" for first in SAMPLE[:23] for second in SAMPLE[20:40])]


def start(folder, ranks, *extra):
    argv = [f"--model={name}={DEMO / name}" for name in ("L", "S_src", "S_tgt")]
    argv += ["--source", "ja", "--target", "en", "--input", str(folder / "src.txt"), *extra]
    argv += ["--output", str(folder / "hyp.txt"), "--report", str(folder / "run.json")]
    launch = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch, "decode.collab", *argv]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, env=environment, start_new_session=True)


def finish(folder, ranks, *extra):
    with start(folder, ranks, *extra) as process:
        assert process.wait(600) == 0, (folder / "log").read_text()


def rank_process(parent, rank):
    """The process id of a rank below torchrun; None where it does not run yet or any more."""
    for folder in Path("/proc").iterdir():
        try:
            child = folder.name.isdigit() and (folder / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(parent)
            if child and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return None


def outcome(folder):
    report = json.loads((folder / "run.json").read_text())
    return (folder / "hyp.txt").read_bytes(), report["sentences"], report["output_tokens"]


def finished(folder):
    journal = folder / "hyp.txt.journal"
    return len({record.line for rank in range(2) for record in read_records(rank_path(journal, rank))})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc")
def test_killed_runs_resume_to_the_bytes_of_an_unbroken_one(tmp_path):
    count = int(os.environ.get("COLLAB_KILLS", "20"))
    given = os.environ.get("COLLAB_KILL_INPUT")
    text = Path(given).read_text(encoding="utf-8") if given else "\n".join(SENTENCES[:500]) + "\n"
    seed = int(os.environ.get("COLLAB_KILL_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    (tmp_path / "src.txt").write_text(text, encoding="utf-8")
    started = time.monotonic()
    finish(tmp_path, 1)
    length = time.monotonic() - started
    expected = outcome(tmp_path)
    print(f"seed {seed}; an unbroken run: {expected[1]} sentences, {expected[2]} tokens, {length:.1f} s")
    number = missed = 0
    while number < count:
        for file in ("hyp.txt", "run.json"):
            (tmp_path / file).unlink(missing_ok=True)
        one_of_two = number % 4 == 3
        victim = number // 4 % 2 if one_of_two else None
        moment = draw.uniform(0.0, length)
        process = start(tmp_path, 2 if one_of_two else 1, "--resume")
        time.sleep(moment)
        if one_of_two:
            while process.poll() is None and (rank := rank_process(process.pid, victim)) is None:
                time.sleep(0.05)
            if process.poll() is None and rank is not None:
                os.kill(rank, signal.SIGKILL)
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait(120)
        if code == 0:  # it had ended already: no kill, again
            missed += 1
            assert missed < 2 * count + 20
            continue
        number += 1
        kept = finished(tmp_path)
        again = draw.choice([1, 2])
        finish(tmp_path, again, "--resume")
        same = outcome(tmp_path) == expected
        who = f"rank {victim} of 2" if one_of_two else "the process"
        print(
            f"kill {number:2}: {who} after {moment:5.2f} s (exit {code}), {kept:3} sentences kept; resumed with "
            f"{again} process(es): {'equal' if same else 'DIFFERENT'}",
            flush=True,
        )
        assert same
        assert not list(tmp_path.glob("hyp.txt.journal*"))
    print(f"{missed} runs ended before their moment came and are not counted")
