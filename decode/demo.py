"""The built-in demo: real trained models translate real sentences, alone and together."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from corpora import sample
from decode.engine.ensemble import Ensemble
from decode.engine.expression import format_weights
from decode.engine.generate import translate
from decode.pipeline.members import EnsembleSpec, open_members
from decode.pipeline.placement import placements
from decode.pipeline.report import scores
from minillama import InputError

FOLDER = Path(__file__).resolve().parent.parent / "demo"
SYSTEMS = {
    "L alone": {"L": 1.0},
    "Proxy-tuning": {"L": 1.0, "S_mt": 1.0, "S_base": -1.0},
    "Collab-MT": {"L": 1.0, "S_src": 1.0, "S_tgt": 1.0},
}
SHOWN = 8


def demo() -> int:
    """Translate the sample with three systems, show some sentences side by side and a table of scores."""
    folders = {name: str(FOLDER / name) for name in ("L", "S_base", "S_mt", "S_src", "S_tgt")}
    missing = [name for name, folder in folders.items() if not Path(folder, "config.json").exists()]
    if missing:
        raise InputError(
            f"{FOLDER}: the demo's models {', '.join(missing)} are not there; run from a clone of the repository, "
            "or train them with demo/train.sh"
        )
    pairs = sample("ja", "en")
    heading = f"{len(pairs)} sentences of {pairs.origin}, Japanese to English, {len(SYSTEMS)} systems on the CPU"
    print(heading, file=sys.stderr)
    members = open_members(folders, None, None)
    spec = EnsembleSpec(folders, dict.fromkeys(folders, 1.0), placements("cpu", None, list(folders)), members)
    models = {member.name: member.model for member in spec.load()[0].members}
    prompts = {member.name: [member.encode(text, "ja", "en") for text in pairs.source] for member in members}
    outputs: dict[str, list[str]] = {}
    table = Table("system", "next token from the softmax of", "BLEU", "chrF", "tokens/s")
    for column in table.columns[2:]:
        column.justify = "right"
    for system, weights in SYSTEMS.items():
        started = time.perf_counter()
        result = translate(Ensemble(models, weights), prompts, max_new_tokens=128)
        speed = sum(map(len, result.tokens)) / (time.perf_counter() - started)
        outputs[system] = [members[0].text(tokens) for tokens in result.tokens]
        found = scores(outputs[system], pairs.target, "en")
        table.add_row(system, format_weights(weights), f"{found['bleu']:.1f}", f"{found['chrf']:.1f}", f"{speed:,.0f}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    differing = [i for i in range(len(pairs)) if len({output[i] for output in outputs.values()}) > 1]
    for index in differing[:SHOWN]:
        grid = Table.grid(padding=(0, 2))
        grid.add_row("Japanese", pairs.source[index], style="bold")
        for system, output in outputs.items():
            grid.add_row(system, output[index])
        grid.add_row("reference", pairs.target[index], style="dim")
        console.print(grid)
        console.print()
    console.print(table)
    console.print(f"BLEU {found['bleu_signature']}\nchrF {found['chrf_signature']}", soft_wrap=True)
    console.print(
        f"{len(pairs)} sentences are a small sample: differences of a point or two are noise. README.md has 500."
    )
    return 0
