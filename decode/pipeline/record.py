"""A finished sentence, as the journal and `--details` hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """`line` counts from 0; `logprobs` are nats, one for each token. `finished`: "stop" or "length".

    nbest: the hypotheses listed for it, best first: text, log-probability in nats, score.   explanations: the fields of
    each token's `decode.engine.attribution.Explanation`; after a "stop" the last is the stop token's.
    """

    line: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str
    nbest: Sequence[Sequence[Any]] = ()
    explanations: Sequence[Sequence[Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, lines from 1. Python writes floats so that they read back as the same bits."""
        entry = {**vars(self), "line": self.line + 1}
        return {name: value for name, value in entry.items() if value or name not in ("nbest", "explanations")}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Record":
        return cls(**{**entry, "line": entry["line"] - 1})
