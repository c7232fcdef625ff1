"""Runs of the command line that can be killed: in processes forked from one that has everything imported."""

import multiprocessing
import os
import socket
import sys
from contextlib import redirect_stderr
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["decode.collab"])


def start(argv, log: Path | None = None, **environment):
    """A process that runs `decode.collab` with these arguments; `log` takes its standard error."""
    process = CONTEXT.Process(target=_run, args=(argv, log, environment))
    process.start()
    return process


def start_ranks(argv, world, folder: Path, **environment):
    """What torchrun starts, without torchrun: rank 0 keeps the store. Returns the processes; logs are rank0.log …"""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {"WORLD_SIZE": str(world), **address, **environment}
    return [
        start(argv, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def code_of(process, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(argv, log, environment):
    os.environ.update(environment)
    import torch

    import decode.pipeline.distributed
    from decode.collab import main
    from minillama.errors import exit_code

    torch.set_num_threads(1)
    decode.pipeline.distributed.LOST_SECONDS = float(environment.get("LOST_SECONDS", decode.pipeline.distributed.LOST_SECONDS))
    with open(log or os.devnull, "w", encoding="utf-8", buffering=1) as stream, redirect_stderr(stream):
        code = exit_code(lambda: main(argv))
    sys.exit(code)
