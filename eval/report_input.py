"""What a study left behind, as `eval.report` asks for it: results.json and the texts beside it.

Any row, cell or file may be missing (a small study has fewer); only a file that is no study's is refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from corpora.text import read_lines
from eval.document import MISSING
from eval.study.expressions import EXPRESSIONS, FINETUNING, ORIGINAL
from minillama.errors import InputError

# A model's rows in the paper's order, by what follows the dot in a row's name.
KNOWN = {"original": ORIGINAL, "finetuning": FINETUNING, **EXPRESSIONS}


@dataclass(frozen=True)
class Study:
    """results.json, and the folder in which it names texts."""

    data: dict[str, Any]
    folder: Path

    @property
    def directions(self) -> list[str]:
        return list(self.data["directions"])

    @property
    def larges(self) -> list[str]:
        return list(self.data.get("larges", []))

    @property
    def compares(self) -> bool:
        """Whether the paper's own figures stand beside ours: the study says that it repeats the paper."""
        return bool(self.data.get("settings", {}).get("compare_with_paper"))

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.data["rows"]}

    def fitted(self, large: str) -> list[str]:
        """Names of our own rows of a large model: the fitted ones."""
        return [row["id"] for row in self.data["rows"] if row.get("fitted") and row.get("large") == large]

    def others(self) -> list[str]:
        """Names of rows that stand in no table of the paper and are not fitted (an expert alone, for instance)."""
        known = {f"{large}.{suffix}" for large in self.models() for suffix in KNOWN}
        return [row["id"] for row in self.data["rows"] if not row.get("fitted") and row["id"] not in known]

    def models(self) -> list[str]:
        """The small model and the large ones, in table order."""
        return [*([self.data["small"]] if self.data.get("small") else []), *self.larges]

    def cell(self, row: str, direction: str) -> dict[str, Any]:
        """A row's figures for a direction, empty where it has none."""
        return self.rows.get(row, {}).get("cells", {}).get(direction) or {}

    def metrics(self, row: str, direction: str) -> dict[str, dict[str, Any]]:
        """Scores by key, in the order of the file."""
        return {metric["key"]: metric for metric in self.cell(row, direction).get("metrics", [])}

    def score(self, row: str, direction: str, key: str) -> float | None:
        return self.metrics(row, direction).get(key, {}).get("score")

    def own_bleu(self, direction: str) -> tuple[str, str] | None:
        """(key, tokenizer) of BLEU with the target language's own tokenizer, where the study has it."""
        for row in self.rows:
            for key, metric in self.metrics(row, direction).items():
                if key.startswith("bleu_"):
                    return key, metric["label"].removeprefix("BLEU ")
        return None

    def p_value(self, row: str, direction: str, against: str, key: str) -> float | None:
        """Paired bootstrap against `proxy` or `large` (L's Original) of the same L."""
        return self.cell(row, direction).get("p", {}).get(against, {}).get(key)

    def lines(self, name: str | None) -> list[str] | None:
        """The lines of a text beside results.json; None where it is not there (a committed copy has none)."""
        if not name or not (self.folder / name).is_file():
            return None
        return read_lines(self.folder / name)

    def row_name(self, row: str) -> tuple[str, str]:
        """(method, expression) of a row, also of one that this study has not."""
        found = self.rows.get(row)
        if found:
            return found["method"], found.get("expression", "")
        expression = KNOWN.get(row.rpartition(".")[2])
        return (expression.method, expression.combine) if expression else (row, "")

    def large_of(self, row: str) -> str:
        """The model that a row's L is, as tables name it."""
        found = self.rows.get(row, {})
        return str(found.get("large") or row.rpartition(".")[0] or MISSING)


def load(path: Path) -> Study:
    """Reads results.json; raises InputError where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the results.json of a study (eval.paper)") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({error}); expected the results.json of a study (eval.paper)") from None
    _require(path, data, ("title", "directions", "rows"))
    for place, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or not {"id", "method"} <= row.keys():
            raise InputError(f"{path}: rows[{place}] has no id or no method; expected a row as eval.paper writes it")
    return Study(data, path.parent)


def _require(path: Path, data: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not isinstance(data, dict) or name not in data]
    if missing:
        raise InputError(f"{path}: has no {missing[0]!r}; expected the results.json of a study (eval.paper)")
