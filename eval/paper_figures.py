"""The paper's own figures, as data: `paper_figures.toml`, which holds nothing that the paper does not print.

A study that repeats the paper is shown beside them (eval.report_tables); other studies do not read them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FIGURES = Path(__file__).with_name("paper_figures.toml")


@dataclass(frozen=True)
class PaperRow:
    """One row: in which tables it stands, and its figures by direction ("ja-en"). BERTScore is Table 2's alone."""

    tables: tuple[int, ...]
    bleu: Mapping[str, float]
    bertscore: Mapping[str, float]

    def score(self, key: str, direction: str) -> float | None:
        """The figure for `bleu` (tokenizer 13a) or `bertscore`; None where the paper has none."""
        scores = {"bleu": self.bleu, "bertscore": self.bertscore}.get(key, {})
        return scores.get(direction)


@dataclass(frozen=True)
class ShownSentence:
    """Table 3's sentence: what its reference mentions, and what the paper shows of each system's translation."""

    direction: str
    reference_mentions: tuple[str, ...]
    shown: Mapping[str, str]


@cache
def paper_rows() -> Mapping[str, PaperRow]:
    """The 24 rows of Table 6 by their names in results.json; Tables 2 and 4 are among them."""
    return {
        name: PaperRow(tuple(row["tables"]), row["bleu"], row.get("bertscore", {}))
        for name, row in _figures()["rows"].items()
    }


@cache
def shown_sentence() -> ShownSentence:
    table = _figures()["table3"]
    return ShownSentence(table["direction"], tuple(table["reference_mentions"]), table["shown"])


@cache
def _figures() -> dict:
    return tomllib.loads(FIGURES.read_text(encoding="utf-8"))
