"""`--explain report.html`: one self-contained page with the explanation of every token.

The page is page.html with page.css, page.js and three blocks of JSON: the run, one line for each sentence, and the
texts of all tokens that occur. Sentences are written in input order as they finish, so memory does not grow with their
number. All outside text is JSON, in which `<` is escaped, and the script shows it as text only. The file is written
atomically; an interrupted run leaves the page of the finished sentences, which says so.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from decode.engine.attribution import Explanation
from decode.engine.expression import format_weights
from decode.pipeline.config import Options
from decode.pipeline.journal import Record
from decode.pipeline.output import OrderedWriter
from minillama import InputError
from minillama.files import atomic_open

DECIMALS = 4


@dataclass(frozen=True)
class ExplainedRun:
    """What is the same for all sentences. pieces: see `Tokenizer.pieces`.   references: by line, may be fewer."""

    weights: Mapping[str, float]
    options: Options
    pieces: Mapping[int, bytes]
    references: Sequence[str] = ()

    @property
    def search(self) -> str:
        """How tokens were chosen, for a reader."""
        options = self.options
        if options.sample:
            top_k = f", top-k {options.top_k}" if options.top_k else ""
            top_p = f", top-p {options.top_p:g}" if options.top_p < 1 else ""
            return f"sampling at temperature {options.temperature:g}{top_k}{top_p}, seed {options.seed}"
        return f"beam search, {options.beam} beams" if options.beam > 1 else "greedy"

    @property
    def other_decider(self) -> str:
        """What decided a token that no member decided."""
        if self.options.sample:
            return "sampling"
        return "the search" if self.options.beam > 1 else "no member"

    def piece(self, token: int) -> str:
        """The token's text; bytes that are no whole characters as `\\xe3`."""
        return self.pieces.get(token, f"<{token}>".encode()).decode("utf-8", errors="backslashreplace")

    def reference(self, line: int) -> str | None:
        return self.references[line] if line < len(self.references) else None


class PageWriter(OrderedWriter):
    """A context manager; `put_sentence` once for each line, in any order."""

    def __init__(self, path: str, run: ExplainedRun) -> None:
        super().__init__(path)
        self.run, self.file = run, ExitStack()
        self.used: set[int] = set()
        self.before_sentences, self.before_end, self.after_end = _template(run)

    def __enter__(self) -> "PageWriter":
        try:
            self.stream = self.file.enter_context(atomic_open(Path(self.path)))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.stream.write(self.before_sentences)
        return self

    def format(self, line: int, source: str, record: Record | None) -> str:
        if record is None:
            return ""
        explanations = [Explanation(*fields) for fields in record.explanations]
        for e in explanations:
            self.used |= {token for token in (e.token, e.runner_up, *e.bests) if token is not None}
        row = {
            "line": line + 1,
            "source": source,
            "reference": self.run.reference(line),
            "text": record.text,
            "finished": record.finished,
            # the explanation's fields in their order, then the deciding member, -1 for none
            "tokens": [[*_rounded([*e]), -1 if e.decider is None else e.decider] for e in explanations],
        }
        return _json(row)

    def __exit__(self, *error: Any) -> None:
        whole = error[0] is None
        if not whole and not self.count:
            self.file.__exit__(*error)
            return
        pieces = {token: self.run.piece(token) for token in sorted(self.used)}
        self.stream.write(self.before_end + _json({"whole": whole, "pieces": pieces}) + self.after_end)
        self.file.close()


def _template(run: ExplainedRun) -> list[str]:
    """The page up to its sentences, from there to the tokens' texts, and the rest."""
    expression, options = format_weights(dict(run.weights)), run.options
    description = {
        "members": list(run.weights.items()),
        "expression": expression,
        "source": options.source,
        "target": options.target,
        "search": run.search,
        "other": run.other_decider,
    }
    folder = files("decode.explain")
    texts = {
        "style": (folder / "page.css").read_text("utf-8"),
        "script": (folder / "page.js").read_text("utf-8"),
        "title": escape(f"{expression}, {options.source} to {options.target}"),
        "run": _json(description),
    }
    page = (folder / "page.html").read_text("utf-8")
    for name, text in texts.items():
        page = page.replace(f"@@{name}@@", text)
    return re.split("@@(?:sentences|end)@@", page)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def _json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
