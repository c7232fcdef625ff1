"""Measuring several systems in one run: they take turns, medians are kept, tokens are compared.

Decoding steps only: each system says when each of its steps ended. The first SETTLING ones, prefill among them, are
left out; the time of a step is the median of all that remain, in all rounds, so what the machine did beside it for a
moment is one step of many.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from decode.bench_shapes import Models, resident_bytes, step_work
from decode.bench_worker import PEERS, Refused, Worker
from minillama import InputError

SETTLING = 4  # steps with which a run begins: prefill, and what is made at its first use
# A logit may differ by so many float32 roundings of the sum's largest terms and by ABSOLUTE: it is the end of a sum
# over hundreds of products in every layer. A choice between tokens closer than that is a tie.
ROUNDINGS, ABSOLUTE = 16, 1e-5
FLOAT32_ROUNDING = 2.0**-23
USABLE_MEMORY = 0.7
# A virtual machine's processors are its neighbours' as well. A measurement from which they took more than this share of
# the processors' time is repeated.
QUIET = 0.02
SETTLE = 0.3  # seconds between two systems' turns: Intel's OpenMP threads spin for 0.2 after their work

Value = TypeVar("Value")


@dataclass(frozen=True)
class System:
    """What is measured: `ours`, `transformers`, `ctranslate2` or `openvino`, and the dtype that it is given."""

    name: str
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    def computes_like(self, other: "System") -> bool:
        """Whether tokens that differ from the other's should be ties. Ours multiplies float16 weights in float32 on a
        CPU: of a bfloat16 model the same ones.
        """
        return self.dtype == other.dtype or (self.name, self.dtype, other.dtype) == ("ours", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """One batch to decode."""

    prompts: dict[str, list[list[int]]]
    batch: int
    steps: int
    context: float

    @property
    def long(self) -> int:
        return SETTLING + self.steps


@dataclass
class Samples:
    """One system's rounds of one case."""

    step_seconds: list[list[float]] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    stolen: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a step: the median of all rounds' steps."""
        return statistics.median(second for steps in self.step_seconds for second in steps)

    def add(self, result: Mapping[str, Any], new_tokens: int) -> None:
        """One round. Where prompts are read in several steps, the last row starts and the first one ends that much
        apart from the others: only steps that decode all rows count.
        """
        clock = result["clock"]
        last_starts = len(clock) - new_tokens
        steps = clock[last_starts + SETTLING - 1 : new_tokens]
        if len(steps) < 2:
            raise InputError(f"--steps {new_tokens - SETTLING}: prompts of this length are read in more; give more")
        self.step_seconds.append([end - start for start, end in itertools.pairwise(steps)])
        self.first_seconds.append(clock[last_starts])
        self.tokens = result["tokens"]


@dataclass
class Bench:
    """What all measurements of a run share. `notes` collects what could not be measured and why."""

    threads: int
    rounds: int
    device: str
    work: Path  # where converted models are kept
    turns: str  # "together": all systems stay loaded; "alone": one at a time; "auto": together if they fit
    clock: str = "wall"
    patience: int = 0  # how often a measurement is repeated that was disturbed
    notes: list[str] = field(default_factory=list)
    # Systems that are loaded now, with the models of the case at hand: who judges differences need not load them again.
    loaded: dict[System, Worker] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def quietly(self, measure: Callable[[], Value]) -> tuple[Value, float]:
        """What `measure` gives, and the share of the processors' time that neighbours took meanwhile.

        Above QUIET it is measured again, at most `patience` times, and the least disturbed measurement is kept.
        """
        found: tuple[Value, float] | None = None
        for _ in range(1 + self.patience):
            before = processor_ticks()
            value = measure()
            worked, taken = (after - start for start, after in zip(before, processor_ticks()))
            share = taken / (worked + taken) if taken else 0.0
            if found is None or share < found[1]:
                found = value, share
            if share <= QUIET:
                break
        assert found is not None
        return found

    def start(self, system: System, models: Models, stops: Sequence[int] | None = None) -> Worker | None:
        """The system, loaded in a process of its own; None, and a note, where it refuses."""
        if system.name in PEERS and len(models.folders) > 1:
            return None
        if system.name == "ctranslate2" and not self._converted(models):
            return None
        worker = Worker(system.name, self.threads, self.clock)
        try:
            arguments: dict[str, Any] = {"folders": models.folders, "combine": models.combine, "stops": stops}
            if system.name in PEERS:
                arguments["work"] = str(self.work)
            worker.ask("load", dtype=system.dtype, device=self.device, **arguments)
        except Refused as refusal:
            self.note(f"{system.label}: {refusal}")
            worker.close()
            return None
        return worker

    def _converted(self, models: Models) -> bool:
        """Converting has its own process: it would count as the peer's memory."""
        worker = Worker("ctranslate2", self.threads)
        try:
            worker.ask("convert", folder=next(iter(models.folders.values())), work=str(self.work))
        except Refused as refusal:
            self.note(f"ctranslate2: {refusal}")
            return False
        finally:
            worker.close()
        return True

    def together(self, systems: Sequence[System], models: Models) -> bool:
        if self.turns != "auto":
            return self.turns == "together"
        needed = sum(resident_bytes(models.configs(), system.dtype) for system in systems)
        return self.device != "cpu" or needed < USABLE_MEMORY * available_memory()

    def samples(
        self, systems: Sequence[System], models: Models, cases: Sequence[Case]
    ) -> Iterator[dict[System, Samples]]:
        """For each case what every system that can run it needed; systems alternate within a round."""
        if self.together(systems, models):
            workers = {system: worker for system in systems if (worker := self.start(system, models)) is not None}
            self.loaded = workers
            try:
                for case in cases:
                    found = {system: Samples() for system in workers}
                    for number in range(self.rounds):
                        for system, worker in workers.items():
                            self._sample(worker, case, found[system], first=number == 0)
                    for system, worker in workers.items():
                        found[system].memory = worker.ask("peak")
                    yield found
            finally:
                self.loaded = {}
                for worker in workers.values():
                    worker.close()
            return
        all_found: list[dict[System, Samples]] = [{} for _ in cases]
        for _ in range(self.rounds):
            for system in systems:
                worker_or_none = self.start(system, models)
                if worker_or_none is None:
                    continue
                try:
                    for case, found in zip(cases, all_found):
                        sample = found.setdefault(system, Samples())
                        self._sample(worker_or_none, case, sample, first=True)
                        sample.memory = worker_or_none.ask("peak")
                finally:
                    worker_or_none.close()
        yield from all_found

    def _sample(self, worker: Worker, case: Case, found: Samples, first: bool) -> None:
        arguments: dict[str, Any] = {"prompts": case.prompts, "batch": case.batch}
        time.sleep(SETTLE)
        if first:
            worker.ask("generate", new_tokens=SETTLING, **arguments)
        result, stolen = self.quietly(lambda: worker.ask("generate", new_tokens=case.long, **arguments))
        found.add(result, case.long)
        found.stolen.append(stolen)

    def profiles(self, system: System, models: Models, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Where the time of each case's steps goes, in a process of its own: a profiler's memory is no part of ours."""
        worker = self.start(system, models)
        if worker is None:
            return []
        try:
            return [
                worker.ask("profile", prompts=case.prompts, short=SETTLING, long=case.long, batch=case.batch)
                for case in cases
            ]
        finally:
            worker.close()


def available_memory() -> float:
    """Bytes that programs can have now; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def processor_ticks() -> tuple[int, int]:
    """(worked, stolen) since this system started, of all processors; nothing where it does not say."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return 0, 0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, line.split()[1:9])
    return user + nice + system + interrupts + soft, stolen


def shares(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def step_rows(
    bench: Bench, systems: Sequence[System], models: Models, cases: Sequence[Case], profile: bool = False
) -> list[dict[str, Any]]:
    """One row a case and system: speed, ratio to transformers' faster dtype, tokens against its same dtype."""
    rows = []
    for case, found in zip(cases, bench.samples(systems, models, cases)):
        peers = {system: samples for system, samples in found.items() if system.name == "transformers"}
        fastest = min(peers, key=lambda peer: peers[peer].seconds, default=None)
        for system, samples in found.items():
            reference = next((peer for peer in peers if system.computes_like(peer)), fastest)
            row = _row(bench, system, samples, models, case)
            if fastest is not None:
                row["ratio_to_transformers"] = round(peers[fastest].seconds / samples.seconds, 3)
                row["transformers_dtype"] = fastest.dtype
            if reference is not None:
                expected, same = peers[reference].tokens, system.computes_like(reference)
                row |= compare(bench, models, case.prompts, reference, expected, samples.tokens, judge=same)
            rows.append(row)
    for system in systems if profile else ():
        mine = [row for row in rows if (row["system"], row["dtype"]) == (system.name, system.dtype)]
        if mine and system.name == "ours":
            for row, found_time in zip(mine, bench.profiles(system, models, cases)):
                row["time"] = found_time
    return rows


def _row(bench: Bench, system: System, samples: Samples, models: Models, case: Case) -> dict[str, Any]:
    count = len(next(iter(case.prompts.values())))
    seconds = samples.seconds
    read, work = step_work(models.configs(), counted_dtype(system.dtype), count, case.context)
    row: dict[str, Any] = {
        "shape": models.shape,
        "system": system.name,
        "dtype": system.dtype,
        "batch": case.batch,
        "members": len(models.folders),
        "context": case.context,
        "tokens_per_second": round(count / seconds, 2),
        "ms_per_step": round(seconds * 1e3, 3),
        "ms_per_step_of_rounds": [round(statistics.median(steps) * 1e3, 3) for steps in samples.step_seconds],
        "stolen_of_rounds": shares(samples.stolen),
        "first_tokens_ms": round(statistics.median(samples.first_seconds) * 1e3, 1),
        "gigabytes_per_second": round(read / seconds / 1e9, 2),
        "gigaflops": round(work / seconds / 1e9, 1),
        "ratio_to_transformers": None,
        "tokens_equal": None,
    }
    return row | samples.memory


def counted_dtype(dtype: str) -> str:
    """What `auto` chose is the engine's to say; its bytes are counted as float32's."""
    return "float32" if dtype == "auto" else dtype


def add_shares(rows: Sequence[dict[str, Any]], machine: Mapping[str, Any]) -> None:
    """What part of the machine's best each row reached, in bytes read and in products."""
    products = machine["matmul_gigaflops"]
    for row in rows:
        best = products.get(counted_dtype(row["dtype"]), products["float32"])
        row["share_of_read_bandwidth"] = round(row["gigabytes_per_second"] / machine["read_gigabytes_per_second"], 3)
        row["share_of_arithmetic"] = round(row["gigaflops"] / best, 3)


def compare(
    bench: Bench,
    models: Models,
    prompts: Mapping[str, Sequence[list[int]]],
    reference: System,
    expected: Sequence[list[int]],
    tokens: Sequence[list[int]],
    stops: Sequence[int] | None = None,
    judge: bool = True,
) -> dict[str, Any]:
    """How many results are the same, and of each that is not the first difference with its margin in the reference.

    margin: the combined logit of the reference's token less that of the other one, both behind the same prefix. Within
    `tolerance` it is a tie, and float32 rounding may choose either. Margins are those of the reference's own dtype;
    without `judge`, for weights that are rounded otherwise, nobody asks for them.
    """
    differing = [index for index, (one, other) in enumerate(zip(expected, tokens)) if list(one) != list(other)]
    differences = []
    for index in differing:
        pairs = list(zip(expected[index], tokens[index]))
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
        case: dict[str, Any] = {
            "prompts": {name: rows[index] for name, rows in prompts.items()},
            "prefix": list(tokens[index][:at]),
        }
        one, other = (row[at] if at < len(row) else None for row in (expected[index], tokens[index]))
        place: dict[str, Any] = {"sentence": index, "position": at}
        differences.append((case | {"first": one, "second": other}, place))
    judged = [(case, row) for case, row in differences if judge and None not in (case["first"], case["second"])]
    loaded = bench.loaded.get(reference) if stops is None else None
    worker = loaded or (bench.start(reference, models, stops) if judged else None)
    if worker is not None:
        try:
            for (_, row), margin in zip(judged, worker.ask("margins", cases=[case for case, _ in judged])):
                tolerance = ABSOLUTE + ROUNDINGS * FLOAT32_ROUNDING * margin["magnitude"]
                row |= {"margin": margin["margin"], "tolerance": tolerance}
                row["tie"] = abs(margin["margin"]) <= tolerance
        finally:
            if worker is not loaded:
                worker.close()
    rows = [row | {"reference_token": case["first"], "token": case["second"]} for case, row in differences]
    return {
        "tokens_equal": not differing,
        "sequences": len(expected),
        "sequences_equal": len(expected) - len(differing),
        "ties": sum(row.get("tie", False) for row in rows),
        "differences": rows,
    }
