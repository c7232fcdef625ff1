"""A score report as a table: rich on a terminal, aligned plain text elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_report(report: Mapping[str, Any]) -> None:
    """One row per system, one column per metric, the signatures below."""
    header, rows = table_rows(report)
    if sys.stdout.isatty():
        _print_rich(header, rows, f"{report['sentences']:,} sentences")
    else:
        for line in plain_table(header, rows):
            print(line)
    for row in report["metrics"]:
        print(f"{row['label']}: {row['signature']}")
    if "bootstrap" in report:
        bootstrap = report["bootstrap"]
        settings = f"{bootstrap['samples']} resamples, seed {bootstrap['seed']}"
        print(f"p: paired bootstrap against {report['hypothesis']}, {settings}")


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells. BERTScore has four decimals, scores out of 100 have two."""
    header = ["system", *(row["label"] for row in report["metrics"])]
    rows = [[report["hypothesis"], *(_number(row["key"], row["score"]) for row in report["metrics"])]]
    for baseline in report.get("baselines", []):
        cells = [f"{_number(row['key'], row['score'])} p={row['p_value']:.3f}" for row in baseline["metrics"]]
        rows.append([baseline["name"], *cells])
    return header, rows


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are padded with spaces."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]


def _print_rich(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _number(key: str, value: float) -> str:
    return f"{value:.4f}" if key == "bertscore" else f"{value:.2f}"
