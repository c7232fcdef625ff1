"""Result tables of README.md and docs/*.md, written from committed run files: `python -m benchmarks.tables [--check]`.

A page has a table between two markers, with the run files that it is made from, separated by commas:

    <!-- table: decode-steps (from benchmarks/results/decode/NAME.json) -->
    <!-- end -->
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpora.text import read_lines
from eval.report_data import load
from eval.report_tables import paper_tables
from eval.tables import MISSING, Inline, Markdown, Table, code, number
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
# The demo's systems by the names of demo/evaluate.sh.
DEMO = {
    "collab": ("Collab-MT", "L + S_src + S_tgt"),
    "collab-half": ("Collab-MT, halved experts", "L + 0.5*S_src + 0.5*S_tgt"),
    "proxy": ("Proxy-tuning", "L + (S_mt - S_base)"),
    "experts": ("the experts without L", "S_src + S_tgt"),
    "L": ("L alone", "L"),
}
GPU_STEP = re.compile(r"^(\S+) +B= *(\d+) step +([\d.]+) ms +replay +([\d.]+) ms", re.MULTILINE)


def _read(path: Path) -> Any:
    return json.loads("\n".join(read_lines(path)))


def demo(path: Path) -> Table:
    """BLEU and chrF of `eval.score --json`, with p-values of BLEU against the first system."""
    scores, rows = _read(path), []
    for system in ({"name": scores["hypothesis"], "metrics": scores["metrics"]}, *scores["baselines"]):
        (bleu, chrf), name = system["metrics"][:2], Path(system["name"]).stem
        method, expression = DEMO.get(name, ("an expert alone", name))
        cells: dict[str, Inline] = {"": method, "next token from the softmax of": code(expression)}
        cells |= {"BLEU": number(bleu["score"]), "chrF": number(chrf["score"])}
        rows.append(cells | {"p (BLEU)": number(bleu["p_value"], 3) if "p_value" in bleu else ""})
    return Table("demo", "", [rows], 2)


def decode_steps(*paths: Path) -> Table:
    """Milliseconds of a decoding step by batch size, of `benchmarks.decode`."""
    measured = [row for path in paths for row in _read(path)["rows"] if row.get("ms_per_step")]
    sizes = sorted({row["batch"] for row in measured})
    systems: dict[tuple[str, str], dict[int, Any]] = {}
    for row in measured:
        labels = f"{row['members']} × {row['shape']}", f"{row['system']}, {row['dtype']}"
        systems.setdefault(labels, {})[row["batch"]] = row
    rows = []
    for (models, system), found in systems.items():
        times = {f"B={size}, ms": number(found.get(size, {}).get("ms_per_step"), 1) for size in sizes}
        ratios = {size: found.get(size, {}).get("ratio_to_transformers") for size in sizes}
        shown = {
            f"B={size}, over transformers": f"{ratio:.2f}×" if ratio else MISSING for size, ratio in ratios.items()
        }
        rows.append({"models": models, "system": system, **times, **shown})
    return Table("decode-steps", "", [rows], 2)


def tuning(path: Path) -> Table:
    """The demo's sums of demo/tune.sh, the best with beams first: dev NLL, BLEU, p against fitted weights."""
    run, rows = _read(path), []
    held_out = {entry["expression"]: entry["held_out_nats"] for fit in run["fits"].values() for entry in fit["against"]}
    systems = [system for system in run["systems"] if not system["name"].startswith("bleu")]
    for system in sorted(systems, key=lambda system: -system["beam"]["bleu"]):
        fit = run["fits"].get(system["name"])
        name = f"fitted, {len(fit['weights'])} members" if fit else code(system["combine"])
        nats = fit["held_out"]["nats"] if fit else held_out.get(system["combine"])
        cells: dict[str, Inline] = {"weights": name, "nats per token": number(nats, 4)}
        for kind, label in (("greedy", "greedy"), ("beam", "four beams")):
            cells[f"BLEU, {label}"] = number(system[kind]["bleu"])
            compared = run["compared"][kind]["likelihood-3"].get(system["name"])
            cells[f"p, {label}"] = number(compared["bleu"]["p_value"], 3) if compared else ""
        rows.append(cells)
    return Table("tuning", "", [rows], 1)


def gpu_steps(*paths: Path) -> Table:
    """Decoding steps on a GPU, from the lines that the measurement printed."""
    rows = []
    for models, batch, step, replay in GPU_STEP.findall("\n".join(line for path in paths for line in read_lines(path))):
        figures = {"B": batch, "step, ms": step, "CUDA graph alone, ms": number(float(replay), 3)}
        rows.append({"models": models, **figures})
    return Table("gpu-steps", "", [rows], 1)


def study(path: Path) -> Table:
    """The paper's Table 6 of one study (results.json of eval.paper), without the paper's own figures."""
    results = load(path)
    results.data["settings"]["compare_with_paper"] = False
    return paper_tables(results)[-1]


TABLES = {table.__name__.replace("_", "-"): table for table in (demo, decode_steps, tuning, gpu_steps, study)}
MARKED = re.compile(rf"(?ms)^<!-- table: ({'|'.join(TABLES)}) \(from ([^)]+)\) -->\n(.*?)^<!-- end -->$")


def write_tables(text: str, page: str, root: Path = ROOT) -> str:
    """The page's text with every table written anew. Raises InputError for an unknown table, a missing file or end."""

    def table(match: re.Match[str]) -> str:
        name, files = match.group(1), match.group(2)
        cells = Markdown().cells(TABLES[name](*(root / file.strip() for file in files.split(","))))
        return f"<!-- table: {name} (from {files}) -->\n{cells}\n<!-- end -->"

    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        expected = f"<!-- table: NAME (from FILES) --> and <!-- end -->, NAME one of {', '.join(TABLES)}"
        raise InputError(f"{page}: a table is not between {expected}")
    return MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.tables", description="Write the pages' tables from run files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs")
    check = parser.parse_args(argv).check
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    before = {page: page.read_text(encoding="utf-8") for page in pages}
    after = {page: write_tables(text, page.name) for page, text in before.items()}
    differing = [page for page in pages if before[page] != after[page]]
    for page in differing:
        print(f"{page.name}: {'differs from its run files' if check else 'written'}")
        if not check:
            atomic_write(page, after[page])
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(exit_code(main))
