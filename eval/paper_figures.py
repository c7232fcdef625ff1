"""The paper's own figures, read from `paper_figures.toml`, which contains nothing that the paper does not print.

The report shows them beside the figures of a study that repeats the paper.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("paper_figures.toml")


@dataclass(frozen=True)
class PaperRow:
    """One row: numbers of the tables that contain it, and its figures by direction ("ja-en").

    BERTScore is in Table 2 only.
    """

    tables: tuple[int, ...]
    bleu: Mapping[str, float]
    bertscore: Mapping[str, float]

    def score(self, key: str, direction: str) -> float | None:
        """The figure for `bleu` (tokenizer 13a) or `bertscore`; None where the paper has none."""
        return {"bleu": self.bleu, "bertscore": self.bertscore}.get(key, {}).get(direction)


@dataclass(frozen=True)
class ShownSentence:
    """Table 3's sentence: words of its reference, and what the paper shows of each system's translation."""

    direction: str
    reference_mentions: tuple[str, ...]
    shown: Mapping[str, str]


@cache
def paper_rows() -> Mapping[str, PaperRow]:
    """The 24 rows of Table 6 by their names in results.json; Tables 2 and 4 are among them."""
    rows = _figures()["rows"].items()
    return {name: PaperRow(tuple(row["tables"]), row["bleu"], row.get("bertscore", {})) for name, row in rows}


@cache
def shown_sentence() -> ShownSentence:
    table = _figures()["table3"]
    return ShownSentence(table["direction"], tuple(table["reference_mentions"]), table["shown"])


def _figures() -> dict[str, Any]:
    return tomllib.loads(FIGURES.read_text(encoding="utf-8"))
