"""Pictures of the results: speed over the batch, where a step's time goes, the scaling sweeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillama import InputError

SWEEPS = {
    "member_sweep": ("members", "members", "ms_per_step", "ms a step"),
    "context_sweep": ("context", "positions in the cache", "ms_per_step", "ms a step"),
    "sentence_sweep": ("sentences", "sentences", "sentences_per_second", "sentences a second"),
}


def plot(folder: Path) -> list[Path]:
    """Draws every run in `folder` (JSON) as PNG files beside it; raises InputError when there is none."""
    import matplotlib

    matplotlib.use("Agg")
    runs = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise InputError(f"{folder}: no results to draw, run python -m decode.bench first")
    drawn: list[Path] = []
    for path, run in runs:
        title = f"{run['device']}, {run['threads']} threads, {run['date'][:10]}"
        for name, rows, draw in _pictures(run):
            drawn.append(_figure(path.with_name(f"{path.stem}-{name}.png"), title, rows, draw))
    return drawn


def _pictures(run: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]], Callable]]:
    found: list[tuple[str, list[dict[str, Any]], Callable]] = []
    if run["rows"]:
        found.append(("steps", run["rows"], _steps))
    timed = [row for row in run["rows"] if "time" in row]
    if timed:
        found.append(("time", timed, _time))
    for section, (x, x_label, y, y_label) in SWEEPS.items():
        if run.get(section):
            found.append((section, run[section], _sweep(x, x_label, y, y_label)))
    return found


def _figure(path: Path, title: str, rows: list[dict[str, Any]], draw: Callable) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes, rows)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _lines(axes: Any, rows: list[dict[str, Any]], x: str, y: str, names: tuple[str, ...]) -> None:
    """One line for each combination of `names`."""
    rows = [row for row in rows if row[y] is not None]
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        mine = sorted((row for row in rows if tuple(row[name] for name in names) == key), key=lambda row: row[x])
        label = ", ".join(f"{part} members" if name == "members" else str(part) for name, part in zip(names, key))
        axes.plot([row[x] for row in mine], [row[y] for row in mine], marker="o", label=label)


def _steps(axes: Any, rows: list[dict[str, Any]]) -> None:
    _lines(axes, rows, "batch", "tokens_per_second", ("shape", "system", "dtype", "members"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows in the batch (B)")
    axes.set_ylabel("tokens a second, decoding steps only")


def _time(axes: Any, rows: list[dict[str, Any]]) -> None:
    parts = sorted({part for row in rows for part in row["time"]["shares"]})
    labels = [f"{row['dtype']}\n{row['members']} members\nB={row['batch']}" for row in rows]
    bottom = [0.0] * len(rows)
    for part in parts:
        heights = [row["time"]["shares"].get(part, 0.0) for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights)]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("share of a step's time")


def _sweep(x: str, x_label: str, y: str, y_label: str) -> Callable:
    def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
        _lines(axes, rows, x, y, ("shape", "system", "dtype") if x == "members" else ("system", "dtype", "members"))
        if x != "members":
            axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw
