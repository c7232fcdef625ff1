"""A study's plot: BLEU by expression, a panel for each direction, as PNG."""

import io
from typing import Any

from eval.report_data import BASELINES, FITTED_PREFIX, KNOWN, Results

COLOURS = ("#1f8a9e", "#c5803a", "#7b6bb5", "#5c9a4a")
SMALL_FONT, PANEL_WIDTH, PANELS_IN_A_ROW = 8, 4.2, 2


def bleu_by_expression(results: Results) -> bytes | None:
    """The PNG; None where the study has no scores. Raises ImportError without matplotlib (the extra `plot`)."""
    scored = [d for d in results.directions if any(_bleu(results, name, d) is not None for name in results.rows)]
    if not scored:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        columns = min(PANELS_IN_A_ROW, len(scored))
        rows = -(-len(scored) // columns)
        height = 1.1 + 0.17 * (len(results.larges) + 1) * max(1, len(_bars(results)))
        size = (PANEL_WIDTH * columns + 1.4, height * rows)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for index, (axes, direction) in enumerate(zip(grid.flat, scored)):
            _draw_panel(results, axes, direction, labelled=index % columns == 0)
        for axes in grid.flat[len(scored) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL_FONT, frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        pyplot.close(figure)
    return png.getvalue()


def _draw_panel(results: Results, axes: Any, direction: str, labelled: bool) -> None:
    bars, larges = _bars(results), results.larges
    thickness = 0.8 / max(1, len(larges))
    for index, large in enumerate(larges):
        offset = (index - (len(larges) - 1) / 2) * thickness
        scores = {y + offset: _bleu(results, f"{large}.{suffix}", direction) for y, suffix in enumerate(bars)}
        shown = {y: score for y, score in scores.items() if score is not None}
        colour = COLOURS[index % len(COLOURS)]
        bar = axes.barh(shown.keys(), shown.values(), thickness * 0.92, color=colour, label=large)
        axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=SMALL_FONT - 1)
    axes.set_yticks(range(len(bars)), [label if labelled else "" for label in bars.values()], fontsize=SMALL_FONT)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    own = results.own_bleu(direction)
    axes.set_title(f"{direction}, BLEU {own[1] if own and not results.compares else '13a'}")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _bleu(results: Results, name: str, direction: str) -> float | None:
    """The BLEU to draw: 13a, as in the paper, if the study compares; else the target language's own if there is one."""
    own = results.own_bleu(direction)
    return results.score(name, direction, own[0] if own and not results.compares else "bleu")


def _bars(results: Results) -> dict[str, str]:
    """Label by suffix of every kind of row: the paper's in its order, then the fitted ones."""
    bars = {suffix: e.method if suffix in BASELINES else e.combine for suffix, e in KNOWN.items()}
    for large in results.larges:
        for name in results.fitted(large):
            bars[name.rpartition(".")[2]] = f"{FITTED_PREFIX}{results.rows[name]['fitted']}"
    present = {name.rpartition(".")[2] for name in results.rows if name.rpartition(".")[0] in results.larges}
    return {suffix: label for suffix, label in bars.items() if suffix in present}
