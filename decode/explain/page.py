"""`--explain report.html`: one page that needs no other file, with every token's explanation.

The page is page.html with page.css, page.js and three blocks of JSON in it: what was run, a line for each
sentence, and the texts of the tokens that occur. Sentences are written as they end and in input order, so what is held
does not grow with their number; figures have four decimals. Everything from outside stands inside JSON, in which `<` is
escaped, and the page's script shows it as text only. The file takes its name when it is whole; a run that is
interrupted leaves the page of what was finished, which says so.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

from decode.engine.attribution import Explanation
from decode.engine.expression import spell
from decode.pipeline.journal import Record
from decode.pipeline.members import Options
from decode.pipeline.output import OrderedWriter
from minillama import InputError
from minillama.files import atomic_open

DECIMALS = 4
PARTS = ("html", "css", "js")


@dataclass(frozen=True)
class Explained:
    """What is the same for all sentences. pieces: see `Tokenizer.pieces`.   references: by line, where there are."""

    weights: Mapping[str, float]
    options: Options
    pieces: Mapping[int, bytes]
    references: Sequence[str] = ()

    @property
    def search(self) -> str:
        options = self.options
        if options.sample:
            kept = f", top {options.top_k}" if options.top_k else ""
            kept += f", mass {options.top_p:g}" if options.top_p < 1 else ""
            return f"sampling at temperature {options.temperature:g}{kept}, seed {options.seed}"
        return f"beam search, {options.beam} beams" if options.beam > 1 else "greedy"

    @property
    def other_decider(self) -> str:
        """Who decided where no member did."""
        if self.options.sample:
            return "the draw"
        return "the search" if self.options.beam > 1 else "nobody"

    def piece(self, token: int) -> str:
        """The token's text; bytes that are no whole characters as `\\xe3`."""
        return self.pieces.get(token, f"<{token}>".encode()).decode("utf-8", errors="backslashreplace")

    def reference(self, line: int) -> str | None:
        return self.references[line] if line < len(self.references) else None


class PageWriter(OrderedWriter):
    """A context; `put_sentence` takes each line once, in any order."""

    def __init__(self, path: str, explained: Explained) -> None:
        super().__init__(path)
        self.explained = explained
        self.used: set[int] = set()
        self.file = ExitStack()
        self.head, self.between, self.tail = _template(explained)

    def __enter__(self) -> "PageWriter":
        try:
            self.stream = self.file.enter_context(atomic_open(Path(self.path)))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.stream.write(self.head)
        return self

    def put_sentence(self, line: int, source: str, record: Record | None) -> None:
        """record: None for a line that is blank or was skipped."""
        self.put(line, "" if record is None else self._row(line, source, record), translated=record is not None)

    def _row(self, line: int, source: str, record: Record) -> str:
        explanations = [Explanation(*fields) for fields in record.explanations]
        for explanation in explanations:
            self.used |= {explanation.token, *explanation.bests}
            self.used |= set() if explanation.runner_up is None else {explanation.runner_up}
        row = {
            "line": line + 1,
            "source": source,
            "reference": self.explained.reference(line),
            "text": record.text,
            "finished": record.finished,
            "tokens": [_figures(explanation) for explanation in explanations],
        }
        return _json(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.count:
            self.file.__exit__(kind, error, trace)
            return
        pieces = {token: self.explained.piece(token) for token in sorted(self.used)}
        self.stream.write(self.between + _json({"whole": kind is None, "pieces": pieces}) + self.tail)
        self.file.close()


def _template(explained: Explained) -> tuple[str, str, str]:
    """The page up to its sentences, from there to the tokens' texts, and the rest."""
    weights, options = dict(explained.weights), explained.options
    run = {
        "members": [[name, weight] for name, weight in weights.items()],
        "expression": spell(weights),
        "source": options.source,
        "target": options.target,
        "search": explained.search,
        "other": explained.other_decider,
    }
    page, style, script = (files("decode.explain").joinpath(f"page.{kind}").read_text("utf-8") for kind in PARTS)
    page = page.replace("@@style@@", style).replace("@@script@@", script)
    title = f"{spell(weights)}, {options.source} to {options.target}"
    page = page.replace("@@title@@", escape(title)).replace("@@run@@", _json(run))
    head, rest = page.split("@@sentences@@")
    between, tail = rest.split("@@end@@")
    return head, between, tail


def _figures(explanation: Explanation) -> list[Any]:
    """The explanation's fields in their order, with the decider behind them, -1 for none."""
    decider = explanation.decider
    return [*map(_rounded, explanation), -1 if decider is None else decider]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
