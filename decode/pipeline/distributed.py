"""The processes of one `torchrun`: which translates which sentences, and how they agree.

Results never travel between processes: each rank writes its own journal, and the main process reads them. They share
torchrun's key/value store for small things: the lines that are done, a counter that makes the chunks of sentences a
work queue, and who is finished. torchrun ends the other processes when one dies; `--resume` does the rest.

With --tensor-parallel a rank is a group of processes that hold a model together (minillama/tensor_parallel.py). The
first of a group is its leader: it takes chunks for all and it alone writes. Collectives exist only inside a group.
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch

from minillama.errors import InputError
from minillama.tensor_parallel import PeerLost, TPGroup

T = TypeVar("T")
JOIN_TIMEOUT = timedelta(minutes=10)
POLL_SECONDS = 0.05


class Distributed:
    """This process among `processes`; a plain run is process 0 of 1 and shares nothing.

    Its group of `tp_size` processes is `rank` of `world`; in it this process is `tp_rank`. `tp` has the collectives.
    """

    def __init__(self) -> None:
        alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
        self.process, self.processes = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self.rank, self.world = self.process, self.processes
        self.tp_rank, self.tp_size = 0, 1
        self.tp: TPGroup | None = None
        # Processes on this machine, which share its memory.
        self.local_world = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        if not alone:
            from torch.distributed import rendezvous

            self.store, _, _ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the output and talks to the user."""
        return self.process == 0

    @property
    def is_leader(self) -> bool:
        """Whether this process takes chunks and writes a journal for its group."""
        return self.tp_rank == 0

    def log(self, text: str) -> None:
        """A line on standard error, from the main process alone."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def form_groups(self, tp_size: int) -> None:
        """Processes 0 to tp_size - 1 are rank 0, and so on; raises InputError where some are left over."""
        if self.processes % tp_size:
            running = "1 process is" if self.processes == 1 else f"{self.processes} processes are"
            raise InputError(
                f"--tensor-parallel {tp_size}: {running} running; start a multiple of {tp_size} with torchrun "
                f"(--nproc-per-node {tp_size})"
            )
        self.tp_size = tp_size
        self.rank, self.tp_rank = divmod(self.process, tp_size)
        self.world = self.processes // tp_size

    def join_group(self, on_gpu: bool) -> TPGroup | None:
        """Open the collectives of this process's group; None where it has no other process."""
        if self.tp_size > 1 and self.tp is None:
            import torch.distributed as dist

            store = dist.PrefixStore(f"group{self.rank}", self.store)
            _ask(
                lambda: dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=store,
                    rank=self.tp_rank,
                    world_size=self.tp_size,
                    timeout=JOIN_TIMEOUT,
                )
            )
            self.tp = TPGroup(self.tp_rank, self.tp_size)
        return self.tp

    def leave_group(self) -> None:
        """Close the collectives, all processes of the group together."""
        if self.tp is not None:
            import torch.distributed as dist

            _ask(dist.barrier)
            dist.destroy_process_group()
            self.tp = None

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Around the checks of a run: what the main process refuses is reported once, by the main process."""
        try:
            yield
        except InputError as error:
            self.share_done(None)
            raise error if self.is_main else InputError(f"rank {self.process}: {error}") from None

    def share_done(self, done: set[int] | None) -> set[int]:
        """The lines that an earlier run finished: the main process gives them, or None for a run that it refuses.

        All other processes get them, and exit with code 2 where the run is refused.
        """
        if self.is_main:
            if self.processes > 1:
                data = zlib.compress(json.dumps(None if done is None else sorted(done)).encode())
                _ask(lambda: self.store.set("done", data))
            return done or set()
        while not _ask(lambda: self.store.check(["done"])):
            time.sleep(POLL_SECONDS)
        found = json.loads(zlib.decompress(_ask(lambda: self.store.get("done"))))
        if found is None:
            raise SystemExit(2)
        return set(found)

    def take_chunks(self, costs: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Indices of sentences for this rank, a chunk at a time, each for one rank only. See `chunks`."""
        work = chunks(costs, self.world, batch_size)
        if self.processes == 1:
            yield from work
            return
        while (number := self._next_chunk()) < len(work):
            yield work[number]

    def _next_chunk(self) -> int:
        """The number of the next chunk; the leader asks for its group."""
        number = _ask(lambda: self.store.add("chunks", 1)) - 1 if self.is_leader else 0
        return number if self.tp is None else int(self.tp.broadcast(torch.tensor(number)))

    def report_finished(self) -> None:
        if self.world > 1 and self.is_leader:
            _ask(lambda: self.store.set(f"finished{self.rank}", b"1"))

    def wait_for_others(self) -> Iterator[None]:
        """Yield now and then until every other rank has finished."""
        keys = [f"finished{rank}" for rank in range(1, self.world)]
        while keys and not _ask(lambda: self.store.check(keys)):
            time.sleep(POLL_SECONDS)
            yield
        yield


def _ask(question: Callable[[], T]) -> T:
    try:
        return question()
    except RuntimeError as error:  # torch.distributed's network errors
        reason = str(error).split("\n")[0]
        raise PeerLost(f"torchrun's store does not answer ({reason})") from None


def chunks(costs: Sequence[int], ranks: int, batch_size: int) -> list[list[int]]:
    """Indices in chunks for ranks to take one by one, the longest sentences first, each chunk a share of what remains.

    costs: of each sentence, in any unit. A chunk is three quarters of an even share of the rest (guided
    self-scheduling, Polychronopoulos & Kuck 1987): a few large chunks keep the slots full, and the last are one batch
    of the shortest sentences, so that no rank waits long for another. One rank takes everything at once.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    if ranks == 1:
        return [order] if order else []
    found = []
    rest = sum(costs)
    while order:
        goal, cost, count = 0.75 * rest / ranks, 0, 0
        while count < len(order) and (count < batch_size or cost < goal):
            cost += costs[order[count]]
            count += 1
        found.append(order[:count])
        order = order[count:]
        rest -= cost
    return found
