"""A study's plot: BLEU by expression, a panel for each direction, as PNG."""

import io

from eval.report_data import Results

PANEL_WIDTH, BAR_HEIGHT = 4.2, 0.17  # inches


def bleu_by_expression(results: Results) -> bytes:
    """The PNG. BLEU is 13a if the study repeats the paper, else the target language's own if there is one.

    Raises ImportError without matplotlib (the extra `plot`).
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = {row.rpartition(".")[2]: results.label(row) for row in results.rows}
    names = [label if isinstance(label, str) else label.text for label in systems.values()]
    directions, larges = results.directions, results.data["larges"]
    size = (PANEL_WIDTH * len(directions) + 1.4, 1.1 + BAR_HEIGHT * (len(larges) + 1) * len(names))
    figure, panels = pyplot.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, direction in zip(panels[0], directions):
        key = "bleu" if results.compares else results.own_bleu(direction) or "bleu"
        panel.set_title(f"{direction}, {results.labels(direction).get(key, 'BLEU')}")
        thickness = 0.8 / max(1, len(larges))
        for index, large in enumerate(larges):
            scores = np.array([results.score(f"{large}.{suffix}", direction, key) for suffix in systems], dtype=float)
            bars = panel.barh([y + index * thickness for y in range(len(names))], scores, thickness, label=large)
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        panel.set_yticks([y + 0.4 - thickness / 2 for y in range(len(names))], names, fontsize=8)
        panel.margins(x=0.12)
    panels[0][0].invert_yaxis()
    panels[0][0].legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    pyplot.close(figure)
    return png.getvalue()
