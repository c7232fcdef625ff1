"""A study's two plots, each as PNG and SVG: BLEU by expression and BLEU by the experts' weight.

Their text and lines are black on nothing, which the HTML page turns into its own ink.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.study.expressions import EXPRESSIONS
from eval.report_input import KNOWN, Study
from eval.report_tables import BASELINES, OURS

COLOURS = ("#1f8a9e", "#c5803a", "#7b6bb5", "#5c9a4a")
SMALL, PANEL_WIDTH, ABREAST = 8, 4.2, 2
# Rows along one line of weights: the experts' share from nothing (L alone) to the plain sum.
ALONG = (("original", 0.0), ("half", 0.5), ("collab", 1.0))
EXPERTS = ("S_srcMT", "S_tgtMT")


@dataclass(frozen=True)
class Plot:
    """A drawn plot: `name` for its files, the bytes of the PNG, the text of the SVG."""

    name: str
    png: bytes
    svg: str
    description: str


def draw_plots(study: Study) -> list[Plot]:
    """Those for which the study has figures. Raises ImportError without matplotlib (the extra `plot`)."""
    found = []
    directions = [direction for direction in study.directions if _scored(study, direction)]
    if directions:
        text = "BLEU by expression, directions side by side"
        found.append(_drawn("bleu-by-expression", text, directions, _height(study), lambda *a: _expressions(study, *a)))
    weighted = [direction for direction in directions if _has_weights(study, direction)]
    if weighted:
        text = "BLEU by the experts' weight relative to L's: 0 is L alone, 1 the plain sum; stars are fitted weights"
        found.append(_drawn("bleu-by-weight", text, weighted, 3.6, lambda *a: _weights(study, *a)))
    return found


def _drawn(
    name: str, description: str, directions: Sequence[str], height: float, draw: Callable[[Any, str, bool], None]
) -> Plot:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans", "font.size": 9}
    with matplotlib.rc_context(settings):
        abreast = min(ABREAST, len(directions))
        rows = -(-len(directions) // abreast)
        size = (PANEL_WIDTH * abreast + 1.4, height * rows)
        figure, grid = pyplot.subplots(rows, abreast, figsize=size, layout="constrained", squeeze=False)
        for place, (axes, direction) in enumerate(zip(grid.flat, directions)):
            draw(axes, direction, place % abreast == 0)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid.flat[len(directions) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        pyplot.close(figure)
    return Plot(name, png.getvalue(), svg.getvalue(), description)


def _key(study: Study, direction: str) -> str:
    """The BLEU that is drawn: beside the paper 13a, which it has; else the target language's own where there is one."""
    own = study.own_bleu(direction)
    return own[0] if own and not study.compares else "bleu"


def _title(study: Study, direction: str) -> str:
    own = study.own_bleu(direction)
    return f"{direction}, BLEU {own[1]}" if own and not study.compares else f"{direction}, BLEU 13a"


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _scored(study: Study, direction: str) -> bool:
    return any(study.score(name, direction, _key(study, direction)) is not None for name in study.rows)


def _bars(study: Study) -> list[tuple[str, str]]:
    """(suffix, label) of every kind of row, the paper's order and then ours."""
    bars = [(suffix, KNOWN[suffix].method) for suffix in BASELINES]
    bars += [(suffix, expression.combine) for suffix, expression in EXPRESSIONS.items()]
    for large in study.larges:
        for name in study.fitted(large):
            label = (name.rpartition(".")[2], f"{OURS}{study.rows[name]['fitted']}")
            bars += [label] * (label not in bars)
    return [bar for bar in bars if any(f"{large}.{bar[0]}" in study.rows for large in study.larges)]


def _height(study: Study) -> float:
    return 1.1 + 0.17 * (len(study.larges) + 1) * max(1, len(_bars(study)))


def _expressions(study: Study, axes: Any, direction: str, labelled: bool) -> None:
    bars, larges = _bars(study), study.larges
    thickness = 0.8 / max(1, len(larges))
    for place, large in enumerate(larges):
        scores = [study.score(f"{large}.{suffix}", direction, _key(study, direction)) for suffix, _ in bars]
        at = [row + (place - (len(larges) - 1) / 2) * thickness for row in range(len(bars))]
        shown = [(y, score) for y, score in zip(at, scores) if score is not None]
        drawn = axes.barh(
            [y for y, _ in shown], [score for _, score in shown], thickness * 0.92, color=_colour(place), label=large
        )
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=SMALL - 1)
    axes.set_yticks(range(len(bars)), [label if labelled else "" for _, label in bars], fontsize=SMALL)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_title(_title(study, direction))
    axes.margins(x=0.12)


def _has_weights(study: Study, direction: str) -> bool:
    return any(len(_line(study, large, direction)) > 1 for large in study.larges)


def _line(study: Study, large: str, direction: str) -> list[tuple[float, float]]:
    points = [(weight, study.score(f"{large}.{suffix}", direction, _key(study, direction))) for suffix, weight in ALONG]
    return [(weight, score) for weight, score in points if score is not None]


def _fitted_points(study: Study, large: str, direction: str) -> list[tuple[float, float]]:
    """(mean weight of the two experts over L's, BLEU) of fitted rows whose weights lie in the plane of those two."""
    points = []
    for name in study.fitted(large):
        weights = study.cell(name, direction).get("weights") or {}
        score = study.score(name, direction, _key(study, direction))
        if score is not None and weights.get("L", 0) > 0 and set(weights) <= {"L", *EXPERTS}:
            mean = sum(weights.get(expert, 0.0) for expert in EXPERTS) / len(EXPERTS)
            points.append((mean / weights["L"], score))
    return points


def _weights(study: Study, axes: Any, direction: str, labelled: bool) -> None:
    for place, large in enumerate(study.larges):
        line = _line(study, large, direction)
        axes.plot([x for x, _ in line], [y for _, y in line], "-o", color=_colour(place), label=large, markersize=4)
        fitted = _fitted_points(study, large, direction)
        if fitted:
            axes.plot(
                [x for x, _ in fitted],
                [y for _, y in fitted],
                "*",
                color=_colour(place),
                markersize=12,
                label=f"{large}, fitted",
            )
        proxy = study.score(f"{large}.proxy", direction, _key(study, direction))
        if proxy is not None:
            label = f"{large}, Proxy-tuning"
            axes.axhline(proxy, color=_colour(place), linewidth=0.8, linestyle=":", label=label)
    axes.set_title(_title(study, direction))
    axes.set_xlabel("experts' weight over L's")
    if labelled:
        axes.set_ylabel("BLEU")
