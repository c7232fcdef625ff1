"""Runs of decode.collab that can be killed: in processes forked from one that has everything imported."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from torch.distributed import TCPStore

from corpora import sample
from decode.collab import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["decode.pipeline.run"])
STORES: list[TCPStore] = []
SENTENCES = [f"{first}{second}" for first in sample().source[:12] for second in sample().source[20:30]]
# Of a run that takes long enough to be killed in the middle; some lines are blank.
LINES = [*SENTENCES[:30], "", " ", *SENTENCES[30:60]]


def arguments(folders, folder, *extra):
    """The command line of a run of src.txt in `folder`, in small batches."""
    models = ["--model", f"A={folders['A']}", "--model", f"C={folders['C']}"]
    texts = ["--source", "ja", "--target", "en", "--input", str(folder / "src.txt")]
    files = ["--output", str(folder / "hyp.txt"), "--report", str(folder / "run.json")]
    limits = ["--batch-size", "8", "--max-new-tokens", "10", "--too-long", "skip"]
    return [*models, *texts, *files, *limits, *extra]


def outcome(folder):
    """The bytes of the output, and the counts that do not depend on how the run went."""
    report = json.loads((folder / "run.json").read_text())
    return (folder / "hyp.txt").read_bytes(), report["sentences"], report["output_tokens"], report["skipped_lines"]


def uninterrupted(folders, folder):
    """The outcome of a run in this process; its files are removed."""
    assert main(arguments(folders, folder)) == 0
    found = outcome(folder)
    for file in ("hyp.txt", "run.json"):
        (folder / file).unlink()
    return found


def start(argv, log: Path | None = None, pipes: Path | None = None, command=main, **environment):
    """A process that runs a command with these arguments; `log` gets its standard error.

    pipes: a folder in which `stdin` and `stdout` are named pipes.
    """
    process = CONTEXT.Process(target=_run, args=(command, argv, log, pipes, environment))
    process.start()
    return process


@contextmanager
def start_with_pipes(argv, folder: Path, command=main):
    """(process, its standard input, its standard output); standard error goes to `log` in the folder."""
    for name in ("stdin", "stdout"):
        os.mkfifo(folder / name)
    process = start(argv, folder / "log", folder, command)
    with open(folder / "stdin", "wb", buffering=0) as stdin, open(folder / "stdout", "rb") as stdout:
        yield process, stdin, stdout


def start_ranks(argv, world, folder: Path, **environment):
    """What torchrun starts; this process keeps the store, in STORES. Returns the processes; logs are rank0.log …"""
    STORES[:] = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(STORES[0].port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared = {"WORLD_SIZE": str(world), "TORCHELASTIC_RESTART_COUNT": "0", **address, **environment}
    return [
        start(argv, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)
    ]


def wait_for_lines(journals, lines):
    """Until each of these journals has more than so many lines."""
    until = time.monotonic() + 120
    while not all(file.exists() and file.read_bytes().count(b"\n") > lines for file in journals):
        time.sleep(0.002)
        assert time.monotonic() < until, "nothing is written"


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    assert code_of(process) == -signal.SIGKILL


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def code_of(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(command, argv, log, pipes, environment):
    os.environ.update(environment)
    if pipes is not None:
        os.dup2(os.open(pipes / "stdin", os.O_RDONLY), sys.stdin.fileno())
        os.dup2(os.open(pipes / "stdout", os.O_WRONLY), sys.stdout.fileno())
    import torch

    from minillama.errors import exit_code

    torch.set_num_threads(1)
    with open(log or os.devnull, "w", encoding="utf-8", buffering=1) as stream, redirect_stderr(stream):
        code = exit_code(lambda: command(argv))
    sys.exit(code)
