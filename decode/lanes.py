"""Members of an ensemble side by side on the cores of a CPU, instead of one after another on all of them.

A product of few rows is read from memory, and two threads that share it read hardly faster than one: they
wait for each other four times a layer. Two threads that each have a model of their own wait for nobody. So members go
into lanes, each a thread of its own with its part of the cores; who would make the others wait comes afterwards, with
all of them. Which member goes where follows from the bytes of their weights and the number of threads alone, never from
a clock. How many threads made a product does not change its bits (tests/decode/test_lanes.py), so the lanes do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Seconds of the average product from which on lanes pay: below, the threads wait for Python's lock in turns.
WORTH_SECONDS = 140e-6
# What one thread reads of a packed weight and computes in a second, to tell the time of a product from its size.
READ_BYTES, PRODUCTS = 18e9, 30e9
# How much faster a member's pass gets by twice the threads. Measured with 1 to 4 rows on two cores: 1.2 to 1.5 for
# SmolLM2's shape, 1.4 for a matrix of 49,152 x 576.
FASTER_BY_TWICE = 1.45


@dataclass(frozen=True)
class Plan:
    """lanes: members (numbers) of each, one after another.   threads: of every lane.   rest: members that come
    afterwards, with all threads.
    """

    lanes: tuple[tuple[int, ...], ...]
    threads: int
    rest: tuple[int, ...]


@functools.cache
def plan(costs: tuple[float, ...], threads: int) -> Plan | None:
    """The fastest way found for members of such costs; None where that is one after another."""
    members = range(len(costs))

    def seconds(cost: float, by_threads: int) -> float:
        return cost / FASTER_BY_TWICE ** math.log2(by_threads)

    best, least = None, 0.99 * seconds(sum(costs), threads)
    for count in range(2, min(len(costs), threads) + 1):
        each = threads // count
        for chosen in _subsets(members, count):
            lanes: list[list[int]] = [[] for _ in range(count)]
            loads = [0.0] * count
            for member in sorted(chosen, key=lambda member: -costs[member]):  # the largest first, to the emptiest lane
                lane = loads.index(min(loads))
                lanes[lane].append(member)
                loads[lane] += costs[member]
            rest = tuple(member for member in members if member not in chosen)
            total = seconds(max(loads), each) + seconds(sum(costs[member] for member in rest), threads)
            if total < least:
                best, least = Plan(tuple(map(tuple, lanes)), each, rest), total
    return best


def _subsets(members: Sequence[int], least: int) -> Iterator[tuple[int, ...]]:
    for size in range(least, len(members) + 1):
        yield from combinations(members, size)


class Lanes:
    """Threads for the members of an ensemble; they end with the object.

    costs: bytes of weights of each member.   products: (bytes, numbers) of the average weight of a layer of each.
    """

    def __init__(self, costs: Sequence[float], products: Sequence[tuple[float, float]]) -> None:
        self.costs = tuple(costs)
        # The positions of a pass from which on every member's products are worth a lane.
        self.least_rows = max(
            0 if held / READ_BYTES >= WORTH_SECONDS else WORTH_SECONDS * PRODUCTS / numbers
            for held, numbers in products
        )
        self._pool: ThreadPoolExecutor | None = None
        self._made_for: Plan | None = None

    def plan(self) -> Plan | None:
        """For as many threads as PyTorch has now."""
        return plan(self.costs, torch.get_num_threads())

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """`work(member)` for every member, in the members' order. There must be a plan."""
        plan = self.plan()
        assert plan is not None
        if self._pool is None or plan != self._made_for:
            self._pool = ThreadPoolExecutor(
                len(plan.lanes) - 1, "lane", initializer=torch.set_num_threads, initargs=(plan.threads,)
            )
            self._made_for = plan
        found: dict[int, Result] = {}

        def one_lane(members: Sequence[int]) -> None:
            for member in members:
                found[member] = work(member)

        others = [self._pool.submit(one_lane, members) for members in plan.lanes[1:]]
        every = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        try:
            one_lane(plan.lanes[0])
        finally:
            torch.set_num_threads(every)
            for other in others:
                other.exception()  # waits: nobody is at work in the caches once this returns
        for other in others:
            other.result()
        one_lane(plan.rest)
        return [found[member] for member in sorted(found)]
