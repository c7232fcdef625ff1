"""The sentences of a file, translated by one process or by several, with a journal behind every finished one."""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode.pipeline.journal import Part, Tail, begin, part_path, records
from decode.pipeline.members import Sentences
from decode.pipeline.distributed import Ranks, shares
from decode.pipeline.results import Results
from decode.pipeline.session import Session

# How often rank 0 looks at what the others have finished.
LOOK_SECONDS = 0.5


@dataclass
class Done:
    """What all processes of this run did together. `first_token_seconds` is the earliest, since the run began."""

    seconds: float = 0.0
    steps: int = 0
    first_token_seconds: float | None = None

    def add(self, seconds: float, steps: int, first_token_seconds: float | None) -> None:
        self.seconds = max(self.seconds, seconds)
        self.steps += steps
        found = [value for value in (self.first_token_seconds, first_token_seconds) if value is not None]
        self.first_token_seconds = min(found, default=None)


@dataclass
class Work:
    """What is to be done: the sentences of the file less what an earlier run finished. `part` is this rank's journal.

    Without a journal (an output that is no file, or a folder that takes no other file) nothing can be resumed.
    """

    prepared: Sentences
    ranks: Ranks
    part: Part | None
    done: set[int]
    summary: Done = field(default_factory=Done)

    @classmethod
    def plan(
        cls, prepared: Sentences, ranks: Ranks, journal: Path | None, run: Mapping[str, Any], resume: bool | None
    ) -> "Work":
        """Rank 0 opens the journal and says what is done; the others hear it and open their parts of it."""
        if journal is None:
            return cls(prepared, ranks, None, set())
        if ranks.first:
            part, done = begin(journal, run, resume)
            ranks.publish_plan(zlib.compress(json.dumps(sorted(done)).encode()))
            return cls(prepared, ranks, part, done)
        done = set(json.loads(zlib.decompress(ranks.plan())))
        if not ranks.leads:  # its leader writes for it
            return cls(prepared, ranks, None, done)
        part = Part(part_path(journal, ranks.rank))
        part.restart(run)
        return cls(prepared, ranks, part, done)

    @property
    def left(self) -> int:
        return len(set(self.prepared.lines) - self.done)

    def translate(self, session: Session | None, results: Results | None, started: float) -> None:
        """Claim shares until none are left, then wait for the other ranks; `results` is rank 0's.

        session: None when nothing is left to do. Raises RankLost when another rank died; what it finished is in
        `results` by then.
        """
        tails = self._tails() if results is not None else []
        if results is not None:
            if self.part is not None:
                for record in records(self.part.path):
                    results.put(record, resumed=True)
            for line in self.prepared.empty:
                results.put_empty(line)
        looked = time.monotonic()
        try:
            if session is not None:
                for line, text, translation in self._own(session):
                    record = session.record(line, text, translation)
                    if self.part is not None:
                        self.part.write(record)
                    if results is not None:
                        results.put(record)
                    if results is not None and tails and time.monotonic() - looked > LOOK_SECONDS:
                        looked = time.monotonic()
                        _collect(tails, results)
                first = session.counters.first_token
                self.summary.add(session.seconds, session.counters.steps, first and first - started)
            if results is not None:
                for _ in self.ranks.wait_for_others():
                    _collect(tails, results)
            elif self.part is not None:
                self.part.end(vars(self.summary))
                self.ranks.say_done()
        finally:
            if results is not None:
                _collect(tails, results)  # an interruption too keeps what other ranks had finished by now
        for tail in tails:
            if tail.summary is not None:
                self.summary.add(**tail.summary)

    def _own(self, session: Session) -> Iterator[tuple[int, str, Any]]:
        lines, prompts = self.prepared.waiting(self.done)
        costs = [sum(map(len, prompt)) for prompt in prompts]
        for share in self.ranks.claims(shares(costs, self.ranks.world, session.options.batch_size)):
            yield from session.decode([lines[n] for n in share], [prompts[n] for n in share])

    def _tails(self) -> list[Tail]:
        if self.part is None:
            return []
        return [Tail(part_path(self.part.path, rank)) for rank in range(1, self.ranks.world)]


def _collect(tails: Sequence[Tail], results: Results) -> None:
    for tail in tails:
        for record in tail.new():
            results.put(record)
