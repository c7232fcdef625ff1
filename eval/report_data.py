"""results.json of a study and the texts beside it, as the report reads them. Any row, score or text may be missing."""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from corpora.text import read_lines
from eval.study.expressions import EXPRESSIONS, FINETUNING, ORIGINAL
from eval.tables import Span, code
from minillama.errors import InputError

# A model's rows in the paper's order, by the part of a row's name after the dot.
KNOWN = {"original": ORIGINAL, "finetuning": FINETUNING, **EXPRESSIONS}
BASELINES = ["original", "finetuning"]
KEYS = {"title", "config", "date", "commit", "machine", "versions", "seconds"}
KEYS |= {"settings", "directions", "small", "larges", "rows", "fits"}


@dataclass(frozen=True)
class Results:
    """results.json, and the folder to which its paths of texts are relative. A row's name is `MODEL.SUFFIX`."""

    data: dict[str, Any]
    folder: Path

    @property
    def directions(self) -> list[str]:
        return list(self.data["directions"])

    @property
    def compares(self) -> bool:
        """Whether the study repeats the paper, so that the paper's figures stand beside ours."""
        return bool(self.data["settings"]["compare_with_paper"])

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.data["rows"]}

    def blocks(self) -> list[list[str]]:
        """Names of all rows, a block for each model."""
        return [list(names) for _, names in groupby(self.rows, key=model_of)]

    def fitted(self, large: str) -> list[str]:
        """Names of a large model's rows with fitted weights."""
        return [name for name, row in self.rows.items() if row["fitted"] and model_of(name) == large]

    def cell(self, row: str, direction: str) -> dict[str, Any]:
        """A row's figures for a direction, empty where it has none."""
        return dict(self.rows.get(row, {}).get("cells", {}).get(direction, {}))

    def labels(self, direction: str) -> dict[str, str]:
        """Labels of a direction's metrics by their keys."""
        cells = (self.cell(row, direction) for row in self.rows)
        return {metric["key"]: metric["label"] for cell in cells for metric in cell.get("metrics", [])}

    def own_bleu(self, direction: str) -> str | None:
        """Key of BLEU with the target language's own tokenizer, if the study has it."""
        return next((key for key in self.labels(direction) if key.startswith("bleu_")), None)

    def score(self, row: str, direction: str, key: str) -> float | None:
        metrics = self.cell(row, direction).get("metrics", [])
        return next((metric["score"] for metric in metrics if metric["key"] == key), None)

    def p_value(self, row: str, direction: str, against: str, key: str) -> float | None:
        """Paired bootstrap against `proxy` or `large` (Original) with the same L."""
        found: float | None = self.cell(row, direction).get("p", {}).get(against, {}).get(key)
        return found

    def lines(self, name: str | None) -> list[str]:
        """The lines of a text beside results.json, none where it is not there (a committed copy has no texts)."""
        return read_lines(self.folder / name) if name and (self.folder / name).is_file() else []

    def label(self, row: str, by_method: bool = False) -> str | Span:
        """A row's name in tables, also of a row that this study does not have: its expression, or its method."""
        suffix = row.rpartition(".")[2]
        if suffix not in KNOWN:
            return f"fitted: {self.rows[row]['fitted']}"
        return KNOWN[suffix].method if by_method or suffix in BASELINES else code(KNOWN[suffix].combine)


def model_of(row: str) -> str:
    """Label of the row's model L."""
    return row.rpartition(".")[0]


def load(path: Path) -> Results:
    """Read results.json; raises InputError for a file that is no study's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        missing = KEYS - data.keys()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise InputError(f"{path}: no JSON object; expected the results.json of eval.paper") from None
    if missing:
        raise InputError(f"{path}: has no {min(missing)!r}; expected the results.json of eval.paper")
    return Results(data, path.parent)
