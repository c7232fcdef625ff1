"""A score report as a table of aligned plain text."""

from collections.abc import Mapping, Sequence
from typing import Any


def print_report(report: Mapping[str, Any]) -> None:
    """Print one row per system, one column per metric, the signatures below."""
    for line in table_lines(report):
        print(line)
    for row in report["metrics"]:
        print(f"{row['label']}: {row['signature']}")
    if "bootstrap" in report:
        bootstrap = report["bootstrap"]
        settings = f"{bootstrap['samples']} resamples, seed {bootstrap['seed']}"
        print(f"p: paired bootstrap against {report['hypothesis']}, {settings}")


def table_lines(report: Mapping[str, Any]) -> list[str]:
    """The table's lines. BERTScore has four decimals, scores out of 100 have two."""
    rows: list[Sequence[str]] = [["system", *(row["label"] for row in report["metrics"])]]
    rows.append([report["hypothesis"], *(_number(row["key"], row["score"]) for row in report["metrics"])])
    for baseline in report.get("baselines", []):
        cells = [f"{_number(row['key'], row['score'])} p={row['p_value']:.3f}" for row in baseline["metrics"]]
        rows.append([baseline["name"], *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _number(key: str, value: float) -> str:
    return f"{value:.4f}" if key == "bertscore" else f"{value:.2f}"
