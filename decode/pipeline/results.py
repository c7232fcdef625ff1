"""Where finished lines go, in whatever order they come: the output, the details, the counts, the progress shown.

It keeps what waits for an earlier line, and texts only where references will be compared with them.
"""

import json
import os
from contextlib import ExitStack
from types import TracebackType

from decode.explain.page import PageWriter
from decode.explain.text import TextWriter
from decode.pipeline.journal import Record
from decode.pipeline.members import Sentences
from decode.pipeline.nbest import NBestWriter
from decode.pipeline.output import OrderedWriter
from decode.pipeline.progress import DecodeProgress


class Results:
    """A context. `put` takes each line once; what comes again (two journals may hold a sentence) is dropped."""

    def __init__(
        self,
        output: str,
        details: str | None,
        nbest: str | None,
        total: int | None,
        keep_texts: bool,
        explain: PageWriter | TextWriter | None = None,
    ) -> None:
        """total: lines to come, where that is known. details: a file for records as JSON lines. nbest: for lists.

        explain: where explanations go, beside the translations or, on standard output, in their place.
        """
        self.output = output
        self.total = total
        self.explain = explain
        # The lines that are being translated, for their source texts.
        self.sentences: Sentences | None = None
        in_place = isinstance(explain, TextWriter) and output == "-"
        self.writer = OrderedWriter(os.devnull if in_place else output)
        self.details = OrderedWriter(details) if details else None
        self.nbest = NBestWriter(nbest)
        self.texts: dict[int, str] | None = {} if keep_texts else None
        self.tokens = self.resumed = self.resumed_tokens = 0
        self.progress: DecodeProgress | None = None
        self.open = ExitStack()

    def __enter__(self) -> "Results":
        self.open.enter_context(self.writer)
        if self.details:
            self.open.enter_context(self.details)
        self.open.enter_context(self.nbest)
        if self.explain:
            self.open.enter_context(self.explain)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.open.__exit__(kind, error, trace)

    def put_empty(self, line: int) -> None:
        self._write(line, "", None)
        self._show().add(0)

    def put(self, record: Record, resumed: bool = False) -> None:
        """resumed: an earlier run had finished it."""
        if record.line < self.writer.next or record.line in self.writer.waiting:
            return
        self.tokens += len(record.tokens)
        if resumed:
            self.resumed += 1
            self.resumed_tokens += len(record.tokens)
        self._write(record.line, record.text, record)
        if not resumed:
            self._show().add(len(record.tokens))

    def put_what_is_finished(self, unfinished: str) -> str:
        """After an interruption: write lines behind unfinished ones too, those empty; says in words what is kept."""
        gaps = self.writer.write_finished()
        self.nbest.write_finished()
        if self.explain:
            self.explain.write_finished()
        of = f" of {self.total:,}" if self.total is not None else ""
        where = "on standard output" if self.output == "-" else f"in {self.output}"
        empty = f"; {gaps:,} empty lines between them stand for sentences that were not" if gaps else ""
        return f"{self.writer.count:,}{of} sentences were finished and are {where}{unfinished}{empty}"

    def _write(self, line: int, text: str, record: Record | None) -> None:
        self.writer.put(line, text, translated=record is not None)
        if self.details:
            entry = record.entry() if record else {"line": line + 1, "text": "", "tokens": [], "logprobs": []}
            self.details.put(line, json.dumps(entry, ensure_ascii=False))
        self.nbest.put(line, record)
        if self.explain:
            self.explain.put_sentence(line, self.sentences.text(line) if self.sentences else "", record)
        if self.texts is not None:
            self.texts[line] = text

    def _show(self) -> DecodeProgress:
        if self.progress is None:
            self.progress = DecodeProgress(self.total, done=self.resumed)
        return self.progress
