"""The README's picture: BLEU of each system from the run.json files of demo/evaluate.sh.

python demo/plot.py OUTPUT docs/demo-bleu.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"collab": "#1f6f8b", "collab-half": "#1f6f8b", "proxy": "#c58940"}


def main(output: str, picture: str) -> None:
    paths = [path for path in Path(output).glob("*.json") if path.stem != "scores"]
    runs = {path.stem: json.loads(path.read_text()) for path in paths}
    rows = sorted((run["bleu"], name, run["combine"]) for name, run in runs.items())
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    bars = axes.barh(
        [row[2] for row in rows], [row[0] for row in rows], color=[COLOURS.get(r[1], "#9aa5ab") for r in rows]
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel(f"BLEU (sacrebleu 13a), {next(iter(runs.values()))['sentences']} sentences, Japanese to English")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
