"""The paper's own figures, read from `paper_figures.toml`, which contains nothing that the paper does not print.

The report shows them beside the figures of a study that repeats the paper.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _figures() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("paper_figures.toml").read_text(encoding="utf-8"))


def paper_rows() -> dict[str, dict[str, Any]]:
    """The 24 rows of Table 6 by their names in results.json; Tables 2 and 4 are among them.

    A row has `tables`, `bleu` and, if it is in Table 2, `bertscore`; scores by direction ("ja-en").
    """
    rows: dict[str, dict[str, Any]] = _figures()["rows"]
    return rows


def paper_score(row: str, key: str, direction: str) -> float | None:
    """The figure for `bleu` (tokenizer 13a) or `bertscore`; None where the paper has none."""
    return paper_rows().get(row, {}).get(key, {}).get(direction) if key in ("bleu", "bertscore") else None


def shown_sentence() -> dict[str, Any]:
    """Table 3's sentence: `direction`, `reference_mentions` (words of its reference), and `shown`, by the system's name
    what the paper shows of its translation.
    """
    sentence: dict[str, Any] = _figures()["table3"]
    return sentence
