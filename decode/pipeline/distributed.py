"""The processes of one `torchrun`: who takes which sentences, and what happens when one of them dies.

Results never travel between processes: each rank writes its own part of the journal, and rank 0 reads the parts. What
they share is torchrun's key/value store, for three small things: rank 0's plan (the lines that are still to do), a
counter from which shares of the work are claimed, and a heartbeat by which a dead rank is noticed. No collectives, so
nothing hangs in one.

With --tensor-parallel a rank is a group of processes that hold a model together (minillama/parallel.py). The first of
them leads: it claims for all, and it alone writes. Only inside a group there are collectives, made when weights are
about to be loaded.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch

from minillama import InputError
from minillama.tensor_parallel import PeerLost, TPGroup

T = TypeVar("T")
BEAT_SECONDS = 1.0
# A rank whose heart has not beaten for so long is dead: its thread beats while models load and while kernels run.
LOST_SECONDS = 60.0
HEARD_SECONDS = 5.0
# A store whose machine is gone may not answer: then the process ends without its heart.
LAST_BEAT_SECONDS = 20.0
JOIN_TIMEOUT = timedelta(minutes=10)


class RankLost(PeerLost):
    """Another process of this run died, or the machine that holds the store did; the text says what that means."""


class Ranks:
    """This process among `processes`; a plain run is process 0 of 1 and shares nothing.

    rank of world: its group of `size` processes, this one at place `index`; without a split model each is its own.
    """

    def __init__(self) -> None:
        alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
        found = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self.process, self.processes = found
        self.rank, self.world = found
        self.index, self.size = 0, 1
        self.part: TPGroup | None = None
        # Processes on this machine, which share its memory.
        self.local_world = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        self.stopped = threading.Event()
        self.heart: threading.Thread | None = None
        if not alone:
            self._join()

    @property
    def first(self) -> bool:
        return self.process == 0

    @property
    def leads(self) -> bool:
        """Whether this process claims and writes for its group."""
        return self.index == 0

    def group_by(self, size: int) -> None:
        """Processes 0..size-1 are rank 0, and so on; raises InputError where that leaves some over."""
        if self.processes % size:
            started = "1 process is" if self.processes == 1 else f"{self.processes} processes are"
            raise InputError(
                f"--tensor-parallel {size}: {started} running; start a multiple of {size} with torchrun "
                f"(--nproc-per-node {size})"
            )
        self.size = size
        self.rank, self.index = divmod(self.process, size)
        self.world = self.processes // size

    def join_group(self, on_gpu: bool) -> TPGroup | None:
        """Open the collectives of this process's group; None where it is alone in it."""
        if self.size > 1 and self.part is None:
            import torch.distributed as dist

            # A connection of its own: waiting for the others in it does not stop the heart.
            store = dist.PrefixStore(f"group{self.rank}", self.store.clone())
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            self._ask(
                lambda: dist.init_process_group(
                    backend, store=store, rank=self.index, world_size=self.size, timeout=JOIN_TIMEOUT
                )
            )
            self.part = TPGroup(self.index, self.size)
        return self.part

    def leave_group(self) -> None:
        """Together, at the end of the work."""
        if self.part is not None:
            import torch.distributed as dist

            self._ask(dist.barrier)
            dist.destroy_process_group()
            self.part = None

    def tell(self, text: str) -> None:
        """A line on standard error, from rank 0 alone."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def refusing_together(self) -> Iterator[None]:
        """Around the checks: what rank 0 refuses is said once; what another rank alone refuses, with its number."""
        try:
            yield
        except InputError as error:
            if self.first:
                self._refuse()
                raise
            self.plan()
            raise InputError(f"rank {self.process}: {error}") from None

    def publish_plan(self, plan: bytes) -> None:
        self._set("plan", plan)

    def plan(self) -> bytes:
        """What rank 0 published; exits quietly with 2 when it refused instead."""
        hearing = _Hearing()
        while not (self._has("plan") or self._has("refused")):
            self._hear(0, hearing)
            time.sleep(0.05)
        if not self._has("plan"):
            self._set(f"heard{self.process}", b"1")
            raise SystemExit(2)
        return self._ask(lambda: self.store.get("plan"))

    def claims(self, shares: Sequence[list[int]]) -> Iterator[list[int]]:
        """The shares of this rank, one at a time, each taken by one rank only."""
        if self.world == 1:
            yield from shares
            return
        while (number := self._claimed()) < len(shares):
            yield shares[number]

    def _claimed(self) -> int:
        """The next share that nobody has; the first of a group takes it for all."""
        number = self._ask(lambda: self.store.add("claimed", 1)) - 1 if self.leads else 0
        return number if self.part is None else int(self.part.broadcast(torch.tensor(number)))

    def say_done(self) -> None:
        if self.world > 1:
            self._set(f"done{self.rank}", b"1")

    def wait_for_others(self) -> Iterator[None]:
        """Rank 0's: yields now and then until every other rank has said that it is done; raises RankLost.

        Of a group its first process is listened to: it does not survive the others.
        """
        for rank in range(1, self.world):
            hearing = _Hearing()
            key = f"done{rank}"
            while not self._has(key):
                self._hear(rank * self.size, hearing)
                time.sleep(0.05)
                yield
        yield

    def leave(self) -> None:
        """Stop the heart and wait for a beat that is under way: a thread that comes back from the store while Python
        shuts down ends the process by SIGABRT.
        """
        self.stopped.set()
        if self.heart is not None:
            self.heart.join(LAST_BEAT_SECONDS)

    def _join(self) -> None:
        from torch.distributed import rendezvous

        self.store, _, _ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        self.heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.heart.start()

    def _beat(self) -> None:
        while True:
            try:
                self.store.add(f"beat{self.process}", 1)
            except RuntimeError:  # the store is gone: the main thread hears of it when it asks
                return
            if self.stopped.wait(BEAT_SECONDS):
                return

    def _hear(self, process: int, hearing: "_Hearing") -> None:
        beat = self._ask(lambda: self.store.add(f"beat{process}", 0))
        if hearing.silence(beat) > LOST_SECONDS:
            raise RankLost(f"rank {process} has not been heard of for {LOST_SECONDS:.0f} s")

    def _refuse(self) -> None:
        """Where rank 0 itself keeps the store, it stays until the others have heard."""
        self._set("refused", b"1")
        until = time.monotonic() + HEARD_SECONDS
        for process in range(1, self.processes):
            while not self._has(f"heard{process}") and time.monotonic() < until:
                time.sleep(0.05)

    def _set(self, key: str, value: bytes) -> None:
        if self.processes > 1:
            self._ask(lambda: self.store.set(key, value))

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self.store.check([key]))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:  # torch.distributed's network errors
            reason = str(error).split("\n")[0]
            raise RankLost(f"torchrun's store does not answer ({reason})") from None


class _Hearing:
    """The last beat that was heard, and when."""

    def __init__(self) -> None:
        self.beat, self.at = -1, time.monotonic()

    def silence(self, beat: int) -> float:
        """Seconds since the count last changed."""
        if beat != self.beat:
            self.beat, self.at = beat, time.monotonic()
        return time.monotonic() - self.at


def shares(costs: Sequence[int], ranks: int, rows: int) -> list[list[int]]:
    """Indices in shares to be claimed one by one, the longest sentences first, every share a part of what remains.

    costs: of each sentence, in any unit. Three quarters of an even part of the rest are taken at a time (guided
    self-scheduling, Polychronopoulos & Kuck 1987): a few large shares keep the rows full, the last are one batch of the
    shortest sentences, so that no rank waits long for another. One rank takes everything at once.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    if ranks == 1:
        return [order] if order else []
    found = []
    rest = sum(costs)
    while order:
        goal, taken, count = 0.75 * rest / ranks, 0, 0
        while count < len(order) and (count < rows or taken < goal):
            taken += costs[order[count]]
            count += 1
        found.append(order[:count])
        order = order[count:]
        rest -= taken
    return found
