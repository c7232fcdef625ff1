"""The processes of one `torchrun`: which translates which sentences, and how they agree.

Results never travel between processes: each rank writes its own journal, and the main process reads them. They share
torchrun's key/value store for small things: the lines that are done, a counter that makes the chunks of sentences a
work queue, and the statistics of a rank that has finished. torchrun ends the other processes when one dies; `--resume`
does the rest.

With --tensor-parallel a rank is a group of processes that hold a model together (minillama/tensor_parallel.py). The
first of a group is its leader: it takes chunks for all and it alone writes. Collectives exist only inside a group.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minillama.errors import InputError
from minillama.tensor_parallel import TPGroup

JOIN_TIMEOUT = timedelta(minutes=10)
POLL_SECONDS = 0.05


class Distributed:
    """This process among `processes`; a plain run is process 0 of 1 and shares nothing.

    Its group of `tp_size` processes is `rank` of `world`; in it this process is `tp_rank`. `tp` has the collectives.
    is_main: it writes the output and the log.   is_leader: it takes chunks and writes a journal for its group. Raises
    torch.distributed.DistError where torchrun's store is lost.
    """

    def __init__(self) -> None:
        alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
        self.process, self.processes = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        # Processes on this machine, which share its memory.
        self.local_world = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        self.is_main = self.process == 0
        self.form_groups(1)
        self.tp: TPGroup | None = None
        if not alone:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))

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
        self.rank, self.tp_rank = divmod(self.process, tp_size)
        self.world, self.tp_size, self.is_leader = self.processes // tp_size, tp_size, self.tp_rank == 0

    def join_group(self, on_gpu: bool) -> TPGroup | None:
        """Open the collectives of this process's group; None where it has no other process."""
        if self.tp_size > 1:
            store = dist.PrefixStore(f"group{self.rank}", self.store)
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            rank, size = self.tp_rank, self.tp_size
            dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=JOIN_TIMEOUT)
            self.tp = TPGroup(rank, size)
        return self.tp

    def leave_group(self) -> None:
        """Close the collectives, all processes of the group together."""
        if self.tp is not None:
            self.tp.all_reduce_min(torch.tensor(0))
            dist.destroy_process_group()

    def share_done(self, done: set[int] | None) -> set[int]:
        """The lines that an earlier run finished: the main process gives them, or None for a run that it refuses.

        All other processes get them, and exit with code 2 where the run is refused.
        """
        if self.is_main:
            if self.processes > 1:
                self.store.set("done", json.dumps(None if done is None else sorted(done)))
            return done or set()
        for _ in self._wait_for("done"):
            pass
        found = json.loads(self.store.get("done"))
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
        """The number of the next chunk; the leader requests it for its group."""
        number = self.store.add("chunks", 1) - 1 if self.is_leader else 0
        return number if self.tp is None else int(self.tp.broadcast(torch.tensor(number)))

    def report_finished(self, stats: Mapping[str, Any]) -> None:
        """To the main process, from the leader of another rank."""
        self.store.set(f"finished{self.rank}", json.dumps(stats))

    def wait_for_others(self) -> Iterator[dict[str, Any] | None]:
        """None now and then, and what each other rank reports once it has finished."""
        for rank in range(1, self.world):
            yield from self._wait_for(f"finished{rank}")
            yield json.loads(self.store.get(f"finished{rank}"))

    def _wait_for(self, key: str) -> Iterator[None]:
        """Until the store has this key. The store's own waiting could not be interrupted, and ends after some time."""
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
            yield


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
