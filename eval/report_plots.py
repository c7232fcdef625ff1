"""A study's two plots as PNG: BLEU by expression, and BLEU by the experts' weight."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report_data import BASELINES, FITTED_PREFIX, KNOWN, Results

COLOURS = ("#1f8a9e", "#c5803a", "#7b6bb5", "#5c9a4a")
SMALL, PANEL_WIDTH, PANELS_IN_A_ROW = 8, 4.2, 2
# Rows along one line of weights: the experts' weight from 0 (L alone) to 1 (the plain sum).
BY_WEIGHT = (("original", 0.0), ("half", 0.5), ("collab", 1.0))
EXPERTS = ("S_srcMT", "S_tgtMT")
Panel = Callable[[Results, Any, str, bool], None]


@dataclass(frozen=True)
class Plot:
    name: str
    description: str
    png: bytes


def draw_plots(results: Results) -> list[Plot]:
    """The plots for which the study has figures. Raises ImportError without matplotlib (the extra `plot`)."""
    plots = []
    scored = [d for d in results.directions if any(_bleu(results, name, d) is not None for name in results.rows)]
    if scored:
        height = 1.1 + 0.17 * (len(results.larges) + 1) * max(1, len(_bars(results)))
        description = "BLEU by expression, directions side by side"
        plots.append(Plot("bleu-by-expression", description, _draw(results, scored, height, _draw_expressions)))
    weighted = [d for d in scored if any(len(_points(results, large, d)) > 1 for large in results.larges)]
    if weighted:
        description = (
            "BLEU by the experts' weight relative to L's: 0 is L alone, 1 the plain sum; stars are fitted weights"
        )
        plots.append(Plot("bleu-by-weight", description, _draw(results, weighted, 3.6, _draw_weights)))
    return plots


def _draw(results: Results, directions: Sequence[str], height: float, panel: Panel) -> bytes:
    """A panel for each direction, under one legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        columns = min(PANELS_IN_A_ROW, len(directions))
        rows = -(-len(directions) // columns)
        size = (PANEL_WIDTH * columns + 1.4, height * rows)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for index, (axes, direction) in enumerate(zip(grid.flat, directions)):
            panel(results, axes, direction, index % columns == 0)
            own = results.own_bleu(direction)
            axes.set_title(f"{direction}, BLEU {own[1] if own and not results.compares else '13a'}")
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid.flat[len(directions) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        pyplot.close(figure)
    return png.getvalue()


def _bleu(results: Results, name: str, direction: str) -> float | None:
    """The BLEU to draw: 13a, as in the paper, if the study compares; else the target language's own if there is one."""
    own = results.own_bleu(direction)
    return results.score(name, direction, own[0] if own and not results.compares else "bleu")


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _bars(results: Results) -> dict[str, str]:
    """Label by suffix of every kind of row: the paper's in its order, then the fitted ones."""
    bars = {suffix: e.method if suffix in BASELINES else e.combine for suffix, e in KNOWN.items()}
    for large in results.larges:
        for name in results.fitted(large):
            bars[name.rpartition(".")[2]] = f"{FITTED_PREFIX}{results.rows[name]['fitted']}"
    return {
        key: label for key, label in bars.items() if any(f"{large}.{key}" in results.rows for large in results.larges)
    }


def _draw_expressions(results: Results, axes: Any, direction: str, labelled: bool) -> None:
    bars, larges = _bars(results), results.larges
    thickness = 0.8 / max(1, len(larges))
    for index, large in enumerate(larges):
        offset = (index - (len(larges) - 1) / 2) * thickness
        scores = {y + offset: _bleu(results, f"{large}.{suffix}", direction) for y, suffix in enumerate(bars)}
        shown = {y: score for y, score in scores.items() if score is not None}
        bar = axes.barh(shown.keys(), shown.values(), thickness * 0.92, color=_colour(index), label=large)
        axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=SMALL - 1)
    axes.set_yticks(range(len(bars)), [label if labelled else "" for label in bars.values()], fontsize=SMALL)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.margins(x=0.12)


def _points(results: Results, large: str, direction: str) -> list[tuple[float, float]]:
    """(the experts' weight over L's, BLEU) of the expressions with fixed weights."""
    points = [(weight, _bleu(results, f"{large}.{suffix}", direction)) for suffix, weight in BY_WEIGHT]
    return [(weight, bleu) for weight, bleu in points if bleu is not None]


def _fitted_points(results: Results, large: str, direction: str) -> list[tuple[float, float]]:
    """(mean weight of the two experts over L's, BLEU) of fitted rows that have no other member."""
    points = []
    for name in results.fitted(large):
        weights = results.cell(name, direction).get("weights") or {}
        bleu = _bleu(results, name, direction)
        if bleu is not None and weights.get("L", 0) > 0 and set(weights) <= {"L", *EXPERTS}:
            mean = sum(weights.get(expert, 0.0) for expert in EXPERTS) / len(EXPERTS)
            points.append((mean / weights["L"], bleu))
    return points


def _draw_weights(results: Results, axes: Any, direction: str, labelled: bool) -> None:
    for index, large in enumerate(results.larges):
        colour = _colour(index)
        axes.plot(*zip(*_points(results, large, direction)), "-o", color=colour, label=large, markersize=4)
        if fitted := _fitted_points(results, large, direction):
            axes.plot(*zip(*fitted), "*", color=colour, markersize=12, label=f"{large}, fitted")
        if (proxy := _bleu(results, f"{large}.proxy", direction)) is not None:
            axes.axhline(proxy, color=colour, linewidth=0.8, linestyle=":", label=f"{large}, Proxy-tuning")
    axes.set_xlabel("experts' weight over L's")
    if labelled:
        axes.set_ylabel("BLEU")
