"""Does a run fit, and what would make it fit: `python -m train.plan --model meta-llama/Llama-3.2-1B --gpu-memory 24`.

Nothing is loaded: shapes come from a folder's config.json, or for well-known models from shapes.toml beside this file.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from minillama import InputError, LlamaConfig
from minillama.cli import Parser
from minillama.config import read_config, read_json
from minillama.errors import exit_code
from train.config import parse
from train.memory import GIB, Memory, memory_of
from train.settings import Settings, add_settings, flag, settings_from

SHAPES = Path(__file__).with_name("shapes.toml")
# In this order, each on top of the ones before: first what changes no result, then what costs exactness.
CHANGES: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 1},
    {"checkpoint_activations": True},
    {"release_gradients": True, "clip": 0.0},
    {"optimizer_state": "int8"},
    {"dtype": "bfloat16"},
    {"lora_rank": 16, "optimizer_state": "", "release_gradients": False},
)
EXAMPLES = """examples:
  python -m train.plan --model meta-llama/Llama-3.2-1B --gpu-memory 24
  python -m train.plan --model runs/base-ja --gpu-memory 80 --ranks 8 --compute-dtype bfloat16 --json
"""


def shape_of(model: str) -> LlamaConfig:
    """The configuration of a folder, a config.json, or a model that shapes.toml knows. Raises InputError otherwise."""
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        return LlamaConfig.from_dict(read_json(path), str(path))
    known: list[str] = []
    for entry in tomllib.loads(SHAPES.read_text(encoding="utf-8"))["shape"]:
        names = entry.pop("names")
        known += names
        if model in names:
            return LlamaConfig(**entry)
    raise InputError(f"--model {model}: no such folder, and its shape is not known here; known: {', '.join(known)}")


def forward_size(settings: Settings, ranks: int) -> int:
    """Positions of a rank's forward pass, where no data says it: its share of the step's sequences, all full."""
    share = -(-settings.batch_size // ranks)
    return min(settings.micro_batch_size or share, share) * settings.sequence_length


def changes_that_fit(
    config: LlamaConfig, settings: Settings, limit: float, positions: int | None, ranks: int, device: str
) -> list[tuple[dict[str, Any], Memory]]:
    """What to change, one on top of the other, until a step fits into `limit` bytes. Empty where nothing makes it."""

    def with_changes(changes: Sequence[dict[str, Any]]) -> Memory:
        changed = settings
        for change in changes:
            changed = replace(changed, **change)
        size = positions or forward_size(changed, ranks)
        return memory_of(config, changed, size, size, ranks, device)

    taken: list[dict[str, Any]] = []
    for change in CHANGES:
        if all(getattr(settings, name) == value for name, value in change.items()):
            continue
        if positions is not None and "micro_batch_size" in change:
            continue  # the size of the forward pass was given
        taken.append(change)
        if with_changes(taken).peak <= limit:
            break
    else:
        return []
    for change in taken[-2::-1]:  # what the last one makes needless, the costliest first
        others = [other for other in taken if other is not change]
        if with_changes(others).peak <= limit:
            taken = others
    return [(change, with_changes(taken[: number + 1])) for number, change in enumerate(taken)]


def memory_lines(memory: Memory) -> Iterator[str]:
    """A line for each part, in GiB."""
    for what, count, remark in memory.rows():
        yield f"{what:12}{gib(count):>10}  {remark}".rstrip()


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / GIB:.4f} GiB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.plan",
        description="Tell whether a training run fits into memory, and what to change.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder, config.json, or a well-known hub id")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of one device")
    parser.add_argument("--ranks", type=int, default=1, help="devices that share the weights (1)")
    parser.add_argument("--positions", type=int, metavar="N", help="of a forward pass (default: full sequences)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--json", action=argparse.BooleanOptionalAction, default=False, help="the figures in bytes, as one JSON object"
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    add_settings(parser, packing="epoch")
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    settings = settings_from(arguments)
    if not arguments.gpu_memory > 0 or arguments.ranks < 1 or (arguments.positions or 1) < 1:
        raise InputError("--gpu-memory, --ranks and --positions must be above 0")
    config = shape_of(arguments.model)
    positions = arguments.positions or forward_size(settings, arguments.ranks)
    limit = arguments.gpu_memory * GIB
    memory = memory_of(config, settings, positions, positions, arguments.ranks, arguments.device)
    fits = memory.peak <= limit
    changes = (
        []
        if fits
        else changes_that_fit(config, settings, limit, arguments.positions, arguments.ranks, arguments.device)
    )
    if arguments.json:
        print(json.dumps({**asdict(memory), "positions": positions, "fits": fits, "changes": [c for c, _ in changes]}))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{arguments.model}: {positions:,} positions in a forward pass, {arguments.ranks} rank(s)")
    for line in memory_lines(memory):
        console.print(line)
    verdict = "fits" if fits else "does not fit"
    console.print(f"It {verdict} into {arguments.gpu_memory:g} GiB.")
    if not fits:
        _advise(console, changes, config, settings, limit, arguments)
    return 0


def _advise(
    console: Console,
    changes: list[tuple[dict[str, Any], Memory]],
    config: LlamaConfig,
    settings: Settings,
    limit: float,
    arguments: argparse.Namespace,
) -> None:
    if changes:
        console.print("What to change, each on top of the one before:")
        for change, memory in changes:
            console.print(f"  {_options(change):44} {gib(memory.peak):>10}")
    for ranks in (2, 4, 8, 16, 32, 64):
        size = arguments.positions or forward_size(settings, ranks)
        memory = memory_of(config, settings, size, size, ranks, arguments.device)
        if ranks > arguments.ranks and memory.peak <= limit:
            console.print(f"Or, as it is: {ranks} ranks, {gib(memory.peak)} on each.")
            return
    if not changes:
        console.print("Nothing in this program makes it fit: take a smaller model or a larger device.")


def _options(change: dict[str, Any]) -> str:
    words = []
    for name, value in change.items():
        if value is False or value == "":
            continue
        words.append(
            flag(name)
            if value is True
            else f"{flag(name)} {value:g}"
            if isinstance(value, float)
            else f"{flag(name)} {value}"
        )
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(exit_code(main))
