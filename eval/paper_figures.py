"""The paper's own figures, read from `paper_figures.toml`, which contains nothing that the paper does not print."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def paper_figures() -> dict[str, Any]:
    """`rows`: the 24 rows of Table 6 by their names in results.json, each with its `tables` and with `bleu` and maybe
    `bertscore` by direction. `table3`: the `direction` of its sentence, `reference_mentions` (words of its reference),
    and `shown`, what the paper shows of each system's translation.
    """
    return tomllib.loads(Path(__file__).with_name("paper_figures.toml").read_text(encoding="utf-8"))


def paper_score(row: str, key: str, direction: str) -> float | None:
    """The paper's `bleu` (tokenizer 13a) or `bertscore`; None where it has none."""
    figure: float | None = paper_figures()["rows"].get(row, {}).get(key, {}).get(direction)
    return figure
