"""A loaded ensemble with the readers of its members: sentences in, translations out, work counted on the way."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from corpora.pairs import one_line
from decode.ensemble import Ensemble
from decode.members import Options, Reader, Sentences, encode_sentences
from decode.search import search
from decode.translate import Counters, Translation


@dataclass
class Session:
    """`translate` may be called for one group of lines after another; the counts run on. `seconds`: decoding alone."""

    ensemble: Ensemble
    readers: Sequence[Reader]
    options: Options
    counters: Counters = field(default_factory=Counters)
    lines: int = 0
    skipped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def encode(self, sentences: Sequence[str], where: str) -> Sentences:
        """Prompts of the next group of lines; raises InputError naming the line of one that is too long."""
        return encode_sentences(sentences, self.readers, self.options, where, self.lines)

    def translate(self, prepared: Sentences) -> Iterator[tuple[int, str, Translation | None]]:
        """(line, text, translation) as each line ends; blank and skipped lines are empty and have no translation."""
        self.skipped += [line + 1 for line in prepared.skipped]
        self.truncated += [line + 1 for line in prepared.truncated]
        self.lines += prepared.count
        for line in prepared.empty:
            yield line, "", None
        options, counters = self.options, self.counters
        limits = options.max_new_tokens, options.batch_size
        started = time.perf_counter()
        for index, translation in search(self.ensemble, prepared.prompts, prepared.lines, options, *limits, counters):
            self.seconds += time.perf_counter() - started
            yield prepared.lines[index], self.text(translation.tokens), translation
            started = time.perf_counter()
        self.seconds += time.perf_counter() - started

    def text(self, tokens: Sequence[int]) -> str:
        """A model may write line breaks; a translation is one line."""
        return one_line(self.readers[0].tokenizer.decode(tokens)).strip()
