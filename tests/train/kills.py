"""A training run killed again and again, for test_checkpoint.py.

Each kill is SIGKILL, at a random moment after the start, after a checkpoint, or while one is being written (its
temporary folder is there before the kill and still after it). The run is then resumed with --resume. In the end its
weights and metrics.jsonl must be, byte for byte, those of an unbroken run.
"""

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tiny import TINY

from corpora import sample
from minillama import Llama, Tokenizer
from train import sft
from train.bpe import train_bpe

# Large enough that a checkpoint takes some 50 ms to write, small enough for ten steps a second.
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 48}
SHAPE = replace(TINY, max_position_embeddings=128, **SIZES)
EVERY = 2  # steps between checkpoints


@dataclass(frozen=True)
class Kill:
    """The step of the last checkpoint at a kill, and whether the next one was being written."""

    kind: str
    saved_step: int
    writing: bool


def arguments_of(folder: Path, output: Path, steps: int) -> list[str]:
    """Of train.sft, with validations, a cosine, and the best weights kept: all the state that a run can have."""
    return [
        *("--model", str(folder / "model"), "--device", "cpu", "--prompt", "plain"),
        *("--train", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv"), "--source", "ja"),
        *("--target", "en", "--lr", "1e-3", "--schedule", "cosine", "--warmup-steps", "5", "--batch-size", "4"),
        *("--micro-batch-size", "2", "--epochs", str(-(-steps // 8)), "--checkpoint-every", str(EVERY)),
        *("--eval-every", "7", "--keep", "best", "--output", str(output), "--resume"),
    ]


def prepare(folder: Path) -> None:
    """A random model and its tokenizer."""
    pairs = sample()
    train_bpe([*pairs.source, *pairs.target], SHAPE.vocab_size, ["English", "Japanese"], folder / "model")
    Llama(SHAPE).init_weights(0).write_files(folder / "model")
    Tokenizer.from_pretrained(folder / "model")


def kill_one(argv: list[str], output: Path, kind: str, chance: random.Random) -> Kill | None:
    """Start the run, kill it, and say where; None when it was done before that."""
    before, start = saved_step(output), time.time()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    if kind == "any moment":
        time.sleep(chance.uniform(0.2, 4.0))
    elif kind == "after a checkpoint":
        wait_for(lambda: saved_step(output) > before + EVERY * chance.randint(0, 2), process)
        time.sleep(chance.uniform(0.0, 0.1))
    else:
        wait_for(lambda: writing(output, start), process)
        time.sleep(chance.uniform(0.0, 0.015))
    if process.poll() is not None:
        assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
        return None
    process.kill()
    process.communicate()
    return Kill(kind, saved_step(output), writing(output, start))


def wait_for(condition, process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def saved_step(output: Path) -> int:
    return max((int(path.name[5:]) for path in output.glob("checkpoints/step-*")), default=0)


def writing(output: Path, since: float) -> bool:
    """Whether there is a half-written checkpoint of a process that began at `since`: not one of a kill before it."""
    for path in output.glob("checkpoints/.step-*.tmp"):
        try:
            if path.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            continue
    return False


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def kill_and_resume(folder: Path, kills: int, writes: int, seed: int) -> list[Kill]:
    """Train on train.tsv of `folder` once unbroken and once with `kills` kills, `writes` of them during a checkpoint.

    Raises AssertionError where the two runs differ, or where the run ended before it had been killed so often.
    """
    chance = random.Random(seed)
    prepare(folder)
    steps = 8 * kills + 8
    assert sft.main(arguments_of(folder, folder / "unbroken", steps)) == 0
    output, found = folder / "killed", []
    arguments = arguments_of(folder, output, steps)
    argv = [sys.executable, "-m", "train.sft", *arguments]
    while len(found) < kills or sum(kill.writing for kill in found) < writes:
        missing = writes - sum(kill.writing for kill in found)
        kind = chance.choice(["any moment", "after a checkpoint", "while writing"])
        if kills - len(found) <= missing:
            kind = "while writing"
        kill = kill_one(argv, output, kind, chance)
        assert kill is not None, f"the run ended after {len(found)} kills; give it more steps"
        found.append(kill)
        print(f"kill {len(found):2}: {kind:18} last checkpoint step {kill.saved_step:3}, writing: {kill.writing}")
    assert sft.main(arguments) == 0
    for one, other in zip(*((run / "metrics.jsonl").open() for run in (folder / "unbroken", output)), strict=True):
        assert one == other
    assert (folder / "unbroken" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert not (output / "checkpoints").exists()
    return found
