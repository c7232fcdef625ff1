"""N-best lists as Moses and Marian write them: `line ||| text ||| F0= log-probability ||| score`, best first.

Lines are counted from 0. F0 is the sum of the log-probabilities in nats, the score that sum normalised by length. An
input line that is blank or was skipped has one entry, empty, with two zeros. Beware: a text may contain ` ||| ` itself;
what stands behind the last two of them are numbers.
"""

from types import TracebackType

from decode.pipeline.journal import Record
from decode.pipeline.output import OrderedWriter


class NBestWriter:
    """A context. `put` takes each line once, in any order; without a path nothing is written."""

    def __init__(self, path: str | None) -> None:
        self.writer = OrderedWriter(path) if path else None

    def __enter__(self) -> "NBestWriter":
        if self.writer:
            self.writer.__enter__()
        return self

    def put(self, line: int, record: Record | None) -> None:
        """record: None for a line that is blank or was skipped."""
        if self.writer is None:
            return
        entries = [f"{line} |||  ||| F0= 0 ||| 0"]
        if record is not None:
            entries = [f"{line} ||| {text} ||| F0= {total:.6f} ||| {score:.6f}" for text, total, score in record.nbest]
        self.writer.put(line, "\n".join(entries), translated=record is not None)

    def write_finished(self) -> None:
        """After an interruption: write what waits behind an unfinished line, which has no entry then."""
        if self.writer:
            waiting = self.writer.waiting
            self.writer.stream.writelines(waiting.pop(line) + "\n" for line in sorted(waiting))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer:
            self.writer.__exit__(kind, error, trace)
