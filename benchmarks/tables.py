"""Result tables of README.md and docs/*.md, written from committed run files: `python -m benchmarks.tables [--check]`.

A page has a table between two markers, with the run files that it is made from, separated by commas:

    <!-- table: decode-steps (from benchmarks/results/decode/NAME.json) -->
    <!-- end -->

Everything between the markers is replaced. `--check` writes nothing and fails if a page differs from its run files.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.report_data import load
from eval.report_tables import paper_tables
from eval.tables import MISSING, Column, Markdown, Row, Table, code, number
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"^<!-- table: (\S+) \(from ([^)]+)\) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
# The demo's systems by the names of demo/evaluate.sh.
DEMO = {
    "collab": ("Collab-MT", "L + S_src + S_tgt"),
    "collab-half": ("Collab-MT, halved experts", "L + 0.5*S_src + 0.5*S_tgt"),
    "proxy": ("Proxy-tuning", "L + (S_mt - S_base)"),
    "experts": ("the experts without L", "S_src + S_tgt"),
    "L": ("L alone", "L"),
    "S_mt": ("an expert alone", "S_mt"),
    "S_src": ("an expert alone", "S_src"),
    "S_tgt": ("an expert alone", "S_tgt"),
}
GPU_STEP = re.compile(r"^(\S+) +B= *(\d+) step +([\d.]+) ms +replay +([\d.]+) ms", re.MULTILINE)


def _figure(label: str) -> Column:
    return Column(label, "number")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def demo(paths: Sequence[Path]) -> Iterator[Row]:
    """BLEU and chrF of `eval.score --json`, with p-values of BLEU against the first system."""
    scores = _read(paths[0])
    for system in ({"name": scores["hypothesis"], "metrics": scores["metrics"]}, *scores["baselines"]):
        bleu, chrf = system["metrics"][:2]
        method, expression = DEMO[Path(system["name"]).stem]
        yield {
            Column(""): method,
            Column("next token from the softmax of"): code(expression),
            _figure("BLEU"): number(bleu["score"]),
            _figure("chrF"): number(chrf["score"]),
            _figure("p (BLEU)"): number(bleu["p_value"], 3) if "p_value" in bleu else "",
        }


def decode_steps(paths: Sequence[Path]) -> Iterator[Row]:
    """Milliseconds of a decoding step by batch size, of `benchmarks.decode`."""
    rows = [row for path in paths for row in _read(path)["rows"] if row.get("ms_per_step")]
    sizes = sorted({row["batch"] for row in rows})
    systems = dict.fromkeys((row["shape"], row["members"], row["system"], row["dtype"]) for row in rows)
    for shape, members, system, dtype in systems:
        same = {"shape": shape, "members": members, "system": system, "dtype": dtype}
        found = {row["batch"]: row for row in rows if same.items() <= row.items()}
        cells: dict[Column, Any] = {Column("models"): f"{members} × {shape}", Column("system"): f"{system}, {dtype}"}
        for size in sizes:
            cells[_figure(f"B={size}, ms")] = number(found.get(size, {}).get("ms_per_step"), 1)
        for size in sizes:
            ratio = found.get(size, {}).get("ratio_to_transformers")
            cells[_figure(f"B={size}, over transformers")] = MISSING if ratio is None else f"{ratio:.2f}×"
        yield cells


def tuning(paths: Sequence[Path]) -> Iterator[Row]:
    """The demo's sums of demo/tune.sh, the best with beams first: dev NLL, BLEU, p against fitted weights."""
    run = _read(paths[0])
    held_out = {entry["expression"]: entry["held_out_nats"] for fit in run["fits"].values() for entry in fit["against"]}
    systems = [system for system in run["systems"] if not system["name"].startswith("bleu")]
    for system in sorted(systems, key=lambda system: -system["beam"]["bleu"]):
        fit = run["fits"].get(system["name"])
        name = f"fitted, {len(fit['weights'])} members" if fit else code(system["combine"])
        nats = fit["held_out"]["nats"] if fit else held_out.get(system["combine"])
        cells: dict[Column, Any] = {Column("weights"): name, _figure("nats per token"): number(nats, 4)}
        for kind, label in (("greedy", "BLEU, greedy"), ("beam", "BLEU, four beams")):
            cells[_figure(label)] = number(system[kind]["bleu"])
            compared = run["compared"][kind]["likelihood-3"].get(system["name"])
            cells[_figure("p")] = number(compared["bleu"]["p_value"], 3) if compared else ""
        yield cells


def training(paths: Sequence[Path]) -> Iterator[Row]:
    """Our training step beside transformers', of `benchmarks.train`."""
    run = _read(paths[0])
    full, pairs, memory = run["full_sequences"], run["sentence_pairs"], run["large_vocabulary"]
    measured = {
        "full sequences, tokens/s": (full["ours_per_second"], full["theirs_per_second"], full["ratio"]),
        "sentence pairs, target tokens/s": (pairs["ours_per_second"], pairs["theirs_per_second"], pairs["ratio"]),
        f"peak memory at {memory['vocabulary']:,} entries, GiB": (
            *(memory[side] / 2**30 for side in ("ours_bytes", "theirs_bytes")),
            run["peak_memory_ratio"],
        ),
    }
    for label, (ours, theirs, ratio) in measured.items():
        cells: dict[Column, Any] = {Column(run["model"]): label, _figure("ours"): number(ours, 1)}
        yield cells | {_figure("transformers"): number(theirs, 1), _figure("ratio"): number(ratio)}


def gpu_steps(paths: Sequence[Path]) -> Iterator[Row]:
    """Decoding steps on a GPU, from the lines that the measurement printed."""
    for path in paths:
        for models, batch, step, replay in GPU_STEP.findall(path.read_text(encoding="utf-8")):
            cells: dict[Column, Any] = {Column("models"): models, _figure("B"): batch}
            yield cells | {_figure("step, ms"): step, _figure("CUDA graph alone, ms"): number(float(replay), 3)}


def study(paths: Sequence[Path]) -> Iterator[Row]:
    """The paper's Table 6 of one study (results.json of eval.paper), without the paper's own figures."""
    results = load(paths[0])
    results.data["settings"]["compare_with_paper"] = False
    yield from paper_tables(results)[-1].rows


TABLES: dict[str, Callable[[Sequence[Path]], Iterator[Row]]] = {
    "demo": demo,
    "decode-steps": decode_steps,
    "tuning": tuning,
    "training": training,
    "gpu-steps": gpu_steps,
    "study": study,
}


def write_tables(text: str, page: str, root: Path = ROOT) -> str:
    """The page's text with every table written anew. Raises InputError for an unknown table, a missing file or end."""

    def table(match: re.Match[str]) -> str:
        name, files = match.group(1), match.group(2)
        if name not in TABLES:
            raise InputError(f"{page}: no table {name!r}, expected one of {', '.join(TABLES)}")
        paths = [root / file.strip() for file in files.split(",")]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{page}: table {name}: no such file: {path.relative_to(root)}")
        cells = Markdown().cells(Table(name, "", [list(TABLES[name](paths))]))
        return f"<!-- table: {name} (from {files}) -->\n{cells}\n<!-- end -->"

    if len(MARKED.findall(text)) != len(re.findall(r"^<!-- table:", text, re.MULTILINE)):
        raise InputError(f"{page}: a table is not between <!-- table: NAME (from FILES) --> and <!-- end -->")
    return MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.tables", description="Write the pages' tables from run files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs")
    arguments = parser.parse_args(argv)
    differing = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        new = write_tables(text, path.name)
        if new != text:
            differing.append(path.name)
            if not arguments.check:
                atomic_write(path, new)
    if differing:
        state = "differ from their run files, run python -m benchmarks.tables" if arguments.check else "written"
        print(f"{', '.join(differing)}: {state}")
    return 1 if differing and arguments.check else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
