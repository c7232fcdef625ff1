"""results.json of a study and the texts beside it, as the report reads them. Any row, score or text may be missing."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from corpora.text import read_lines
from eval.study.expressions import EXPRESSIONS, FINETUNING, ORIGINAL
from eval.tables import MISSING, Inline, code
from minillama.errors import InputError

# A model's rows in the paper's order, by the part of a row's name after the dot.
KNOWN = {"original": ORIGINAL, "finetuning": FINETUNING, **EXPRESSIONS}
BASELINES = ["original", "finetuning"]
FITTED_PREFIX = "fitted: "


@dataclass(frozen=True)
class Results:
    """results.json, and the folder to which its paths of texts are relative. A row's name is `MODEL.SUFFIX`."""

    data: dict[str, Any]
    folder: Path

    @property
    def directions(self) -> list[str]:
        return list(self.data["directions"])

    @property
    def smalls(self) -> list[str]:
        return [self.data["small"]] if self.data.get("small") else []

    @property
    def larges(self) -> list[str]:
        return list(self.data.get("larges", []))

    @property
    def compares(self) -> bool:
        """Whether the study repeats the paper, so that the paper's figures stand beside ours."""
        return bool(self.data.get("settings", {}).get("compare_with_paper"))

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.data["rows"]}

    def fitted(self, large: str) -> list[str]:
        """Names of a large model's rows with fitted weights."""
        return [row["id"] for row in self.data["rows"] if row.get("fitted") and row.get("large") == large]

    def blocks(self) -> list[list[str]]:
        """Names of all rows, a block for each model, and a last one for rows that are in no table of the paper."""
        blocks = [[f"{small}.{suffix}" for suffix in BASELINES] for small in self.smalls]
        blocks += [[*(f"{large}.{suffix}" for suffix in KNOWN), *self.fitted(large)] for large in self.larges]
        known = {f"{model}.{suffix}" for model in (*self.smalls, *self.larges) for suffix in KNOWN}
        blocks.append([name for name, row in self.rows.items() if not row.get("fitted") and name not in known])
        present = [[name for name in block if name in self.rows] for block in blocks]
        return [block for block in present if block]

    def cell(self, row: str, direction: str) -> dict[str, Any]:
        """A row's figures for a direction, empty where it has none."""
        return self.rows.get(row, {}).get("cells", {}).get(direction) or {}

    def metrics(self, row: str, direction: str) -> dict[str, dict[str, Any]]:
        """Metrics by key, in the order of the file."""
        return {metric["key"]: metric for metric in self.cell(row, direction).get("metrics", [])}

    def score(self, row: str, direction: str, key: str) -> float | None:
        return self.metrics(row, direction).get(key, {}).get("score")

    def own_bleu(self, direction: str) -> tuple[str, str] | None:
        """(key, tokenizer) of BLEU with the target language's own tokenizer, if the study has it."""
        for row in self.rows:
            for key, metric in self.metrics(row, direction).items():
                if key.startswith("bleu_"):
                    return key, metric["label"].removeprefix("BLEU ")
        return None

    def p_value(self, row: str, direction: str, against: str, key: str) -> float | None:
        """Paired bootstrap against `proxy` or `large` (Original) with the same L."""
        return self.cell(row, direction).get("p", {}).get(against, {}).get(key)

    def lines(self, name: str | None) -> list[str] | None:
        """The lines of a text beside results.json; None where it is not there (a committed copy has none)."""
        return read_lines(self.folder / name) if name and (self.folder / name).is_file() else None

    def translations(self, row: str, direction: str) -> list[str] | None:
        return self.lines(self.cell(row, direction).get("hypothesis_file"))

    def large_of(self, row: str) -> str:
        """Label of the row's model L."""
        return str(self.rows.get(row, {}).get("large") or row.rpartition(".")[0] or MISSING)

    def label(self, row: str, by_method: bool = False) -> Inline:
        """A row's name in tables, also of a row that this study does not have: its expression, or its method."""
        suffix = row.rpartition(".")[2]
        known = {"method": KNOWN[suffix].method, "expression": KNOWN[suffix].combine} if suffix in KNOWN else {}
        found = self.rows.get(row, known)
        if found.get("fitted"):
            return f"{FITTED_PREFIX}{found['fitted']}"
        if by_method or suffix in BASELINES or not found.get("expression"):
            return str(found.get("method", row))
        return code(found["expression"])


def load(path: Path) -> Results:
    """Read results.json; raises InputError for a file that is no study's."""
    expected = "expected the results.json of a study (eval.paper)"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {expected}") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({error}); {expected}") from None
    for name in ("title", "directions", "rows"):
        if not isinstance(data, dict) or name not in data:
            raise InputError(f"{path}: has no {name!r}; {expected}")
    for index, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or not {"id", "method"} <= row.keys():
            raise InputError(f"{path}: rows[{index}] has no id or no method; expected a row as eval.paper writes it")
    return Results(data, path.parent)
