"""A loaded ensemble with the readers of its members: sentences in, translations out, work counted on the way.

Nothing here grows with the number of sentences.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from corpora.pairs import one_line
from decode.engine.ensemble import Ensemble
from decode.pipeline.journal import Record
from decode.pipeline.members import Options, Reader, Sentences, encode_sentences
from decode.pipeline.memory import Budget, capacities
from decode.search import search
from decode.translate import Counters, Translation

# Numbers of lines that were too long, kept for the report; beyond that they are only counted.
LISTED = 1000


class TimedCounters(Counters):
    """The engine's counters, and when the first token was counted (time.perf_counter)."""

    first_token: float | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "tokens" and value and self.first_token is None:
            self.first_token = time.perf_counter()


@dataclass
class TooLong:
    """Lines, numbered from 1, that no context had room for: how many, and the first of them."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, lines: Sequence[int]) -> None:
        self.count += len(lines)
        self.lines += [line + 1 for line in lines[: LISTED - len(self.lines)]]


@dataclass
class Session:
    """`translate` may be called for one group of lines after another; the counts run on. `seconds`: decoding alone.

    With a budget the rows of each group are what fits it; `may_lower` says whether that may be fewer than asked for.
    """

    ensemble: Ensemble
    readers: Sequence[Reader]
    options: Options
    budget: Budget | None = None
    may_lower: bool = True
    counters: TimedCounters = field(default_factory=TimedCounters)
    lines: int = 0
    skipped: TooLong = field(default_factory=TooLong)
    truncated: TooLong = field(default_factory=TooLong)
    seconds: float = 0.0

    def encode(self, sentences: Sequence[str], where: str) -> Sentences:
        """Prompts of the next group of lines; raises InputError naming the line of one that is too long."""
        return encode_sentences(sentences, self.readers, self.options, where, self.lines)

    def count(self, prepared: Sentences) -> None:
        self.skipped.add(prepared.skipped)
        self.truncated.add(prepared.truncated)
        self.lines += prepared.count

    def translate(self, prepared: Sentences) -> Iterator[tuple[int, str, Translation | None]]:
        """(line, text, translation) as each line ends; blank and skipped lines are empty and have no translation."""
        self.count(prepared)
        for line in prepared.empty:
            yield line, "", None
        yield from self.decode(prepared.lines, prepared.prompts)

    def decode(
        self, lines: Sequence[int], prompts: Sequence[tuple[list[int], ...]]
    ) -> Iterator[tuple[int, str, Translation]]:
        """The same for prompts of given lines, which are counted elsewhere."""
        options, new, rows = self.options, self.options.max_new_tokens, self.options.batch_size
        if self.budget is not None and prompts:
            positions = capacities(prompts, self.readers, new)
            rows = self.budget.rows(positions, min(rows, len(prompts)), self.may_lower)
        started = time.perf_counter()
        for index, translation in search(self.ensemble, prompts, lines, options, new, rows, self.counters):
            self.seconds += time.perf_counter() - started
            yield lines[index], self.text(translation.tokens), translation
            started = time.perf_counter()
        self.seconds += time.perf_counter() - started

    def text(self, tokens: Sequence[int]) -> str:
        """A model may write line breaks; a translation is one line."""
        return one_line(self.readers[0].tokenizer.decode(tokens)).strip()

    def record(self, line: int, text: str, translation: Translation) -> Record:
        nbest = [[self.text(found.tokens), sum(found.logprobs), found.score] for found in translation.nbest]
        explanations = [list(explanation) for explanation in translation.explanations]
        return Record(line, text, translation.tokens, translation.logprobs, translation.finished, nbest, explanations)
