"""`--dry-run`: what a run would do, and its first samples as the model would see them, with nothing written."""

# B rows  T positions

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minillama import LlamaConfig, Tokenizer
from train.data import Example
from train.distributed import World
from train.loop import schedule_of
from train.memory import memory_of
from train.plan import add_rows
from train.settings import Settings

SAMPLES = 3
# Steps whose forward passes are laid out to see how full they are.
LOOKED_AT = 50
# Marks of a target where there is no colour.
OPEN, CLOSE = "«", "»"


def show(
    config: LlamaConfig, tokenizer: Tokenizer, examples: Sequence[Example], settings: Settings, world: World
) -> None:
    """Print examples, tokens, steps, density, memory, and three samples with their targets in colour."""
    console = Console(highlight=False, soft_wrap=True)
    schedule = schedule_of(examples, settings, World())
    tokens, targets = sum(len(e.tokens) for e in examples), sum(e.targets for e in examples)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("examples", f"{len(examples):,}, {tokens:,} tokens, {targets / tokens:.0%} of them targets")
    per_epoch = ", ".join(f"{schedule.steps_in_epoch(epoch):,}" for epoch in range(settings.epochs)[:3])
    more = ", …" if settings.epochs > 3 else ""
    table.add_row("steps", f"{schedule.total_steps:,} in {settings.epochs} epochs ({per_epoch}{more})")
    looked = range(min(LOOKED_AT, schedule.total_steps))
    batches = [batch for step in looked for batch in schedule.micro_batches(step)]
    positions = [batch.inputs_BT.numel() for batch in batches]
    inputs = sum(len(e.tokens) - 1 for step in looked for e in schedule.examples_of(step))
    row = f"{settings.packing}: {sum(positions) / len(positions):,.0f} positions in a forward pass"
    if inputs > sum(positions):
        row += f", no padding, a prefix in common saves {1 - sum(positions) / inputs:.0%}"
    else:
        row += f", {inputs / sum(positions):.1%} of them examples', {1 - inputs / sum(positions):.1%} padding"
    if settings.packing == "epoch":
        sequences = sum(len(schedule._sequences(step)) for step in looked)
        row += f"; sequences {inputs / sequences / settings.sequence_length:.1%} full"
    table.add_row("packing", row)
    table.add_row("ranks", f"{world.size} on {world.device.type}")
    memory = memory_of(config, settings, max(positions), max(len(b.targets_M) for b in batches), world.size)
    add_rows(table, memory)
    console.print(table)
    single = schedule_of(examples, dataclasses.replace(settings, micro_batch_size=1), World())
    for number in range(SAMPLES):
        chosen = [examples[index] for index in single.indices_of(0, number)]
        if chosen:
            console.print(f"\nsample {number + 1}: {sum(len(e.tokens) for e in chosen)} tokens", style="bold")
        for example in chosen:
            console.print(_painted(example, tokenizer, console.is_terminal))


def _painted(example: Example, tokenizer: Tokenizer, colour: bool) -> Text:
    prompt = tokenizer.decode(example.tokens[: example.first_target])
    target = tokenizer.decode(example.tokens[example.first_target :])
    text = Text(prompt, style="dim")
    if colour:
        return text.append(target, style="bold green not dim")
    return text.append(OPEN + target + CLOSE)
