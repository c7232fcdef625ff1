"""One file of all that demo/tune.sh measured: python demo/tune_summary.py OUTPUT NAME…"""

import json
import sys
from pathlib import Path
from typing import Any

from minillama.files import atomic_write


def main(output: str, *names: str) -> None:
    folder = Path(output)

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    systems = []
    for name in names:
        row: dict[str, Any] = {"name": name, "combine": read(f"{name}.greedy.json")["combine"]}
        for kind in ("greedy", "beam", "hand"):
            if (folder / f"{name}.{kind}.json").exists():
                row[kind] = {key: read(f"{name}.{kind}.json")[key] for key in ("bleu", "chrf", "sentences")}
        systems.append(row)
    compared = {
        kind: {
            path.name.split(".")[0]: {
                Path(row["name"]).name.split(".")[0]: {entry["key"]: entry for entry in row["metrics"]}
                for row in read(path.name)["baselines"]
            }
            for path in sorted(folder.glob(f"*.{kind}.scores.json"))
        }
        for kind in ("greedy", "beam")
    }
    by_hand = [row for row in systems if "hand" in row]  # those translated the text that others were fitted on
    found = {
        "systems": systems,
        "best_by_hand": {
            kind: max(by_hand, key=lambda row: row[kind]["bleu"])["name"] for kind in ("hand", "greedy", "beam")
        },
        "fits": {path.name.split(".")[0]: read(path.name) for path in sorted(folder.glob("*.tune.json"))},
        "scipy": read("scipy.json"),
        "compared": compared,
        "run": {key: read(f"{names[0]}.greedy.json")[key] for key in ("bleu_signature", "chrf_signature", "versions")},
    }
    root = f"{Path(__file__).resolve().parent.parent}/"
    text = json.dumps(found, indent=1, ensure_ascii=False).replace(root, "")
    atomic_write(folder / "tune-demo.json", text + "\n")
    for row in systems:
        print(f"{row['name']:14} {row['greedy']['bleu']:6.2f} {row['beam']['bleu']:6.2f}  {row['combine']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
