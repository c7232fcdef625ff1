"""`--dry-run`: what a run would do, and its first samples as the model would see them, with nothing written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.text import Text

from minillama import LlamaConfig, Tokenizer
from train.data import Example, Schedule
from train.distributed import World
from train.loop import schedule_of
from train.memory import memory_of
from train.plan import memory_lines
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
    # The first rank's share of the data decides its memory; steps and tokens are those of all ranks.
    schedule = schedule_of(examples, settings, world)
    looked = range(min(LOOKED_AT, schedule.total_steps))
    batches = [batch for step in looked for batch in schedule.micro_batches(step)]
    sizes = [batch.inputs_BT.numel() for batch in batches]
    tokens, targets = sum(len(e.tokens) for e in examples), sum(e.targets for e in examples)
    epochs = [f"{schedule.steps_in_epoch(epoch):,}" for epoch in range(settings.epochs)]
    lines = [
        ("examples", f"{len(examples):,}"),
        ("tokens", f"{tokens:,}, {targets / tokens:.0%} of them targets"),
        ("steps", f"{schedule.total_steps:,}; by epoch {', '.join(epochs[:5])}{', …' if len(epochs) > 5 else ''}"),
        ("ranks", f"{world.size}, on {world.device.type}"),
        ("packing", f"{settings.packing}; {sum(sizes) / len(sizes):,.0f} positions in a forward pass"),
        ("density", density(schedule_of(examples, settings, World()), looked)),
    ]
    for name, text in lines:
        console.print(f"{name:12}{text}")
    most = max(len(batch.targets_M) for batch in batches)
    for line in memory_lines(memory_of(config, settings, max(sizes), most, world.size, world.device.type)):
        console.print(line)
    single = schedule_of(examples, replace(settings, micro_batch_size=1), World())
    for number in range(SAMPLES):
        chosen = [examples[index] for index in single.indices_of(0, number)]
        if chosen:
            length = sum(len(example.tokens) for example in chosen)
            console.print(f"\nsample {number + 1}: {length} tokens, {len(chosen)} example(s)", style="bold")
        for example in chosen:
            console.print(painted(example, tokenizer, console.is_terminal))


def density(schedule: Schedule, steps: range) -> str:
    """How many of the positions computed are examples' own, over some steps of all ranks."""
    needed = sum(len(example.tokens) - 1 for step in steps for example in schedule.examples_of(step))
    computed = sum(batch.inputs_BT.numel() for step in steps for batch in schedule.micro_batches(step))
    if computed < needed:
        text = f"no padding; a prefix in common, computed once, saves {1 - computed / needed:.0%}"
    else:
        text = f"{needed / computed:.1%}, {1 - needed / computed:.1%} padding"
    if schedule.packing == "epoch":
        single = replace(schedule, micro_batch_size=1)
        room = sum(1 for step in steps for _ in single.micro_batches(step)) * schedule.sequence_length
        text += f"; sequences of {schedule.sequence_length:,} are {needed / room:.1%} full"
    return text


def painted(example: Example, tokenizer: Tokenizer, colour: bool) -> Text:
    """The example's text, control tokens by name; targets in colour, or between marks."""
    prompt = "".join(_readable(example.tokens[: example.first_target], tokenizer))
    target = "".join(_readable(example.tokens[example.first_target :], tokenizer))
    if colour:
        return Text(prompt, style="dim").append(target, style="bold green not dim")
    return Text(prompt + OPEN + target + CLOSE)


def _readable(tokens: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    names = {token: name for name, token in tokenizer.specials.items()}
    for name, group in groupby(tokens, key=names.get):
        run = list(group)
        yield tokenizer.decode(run) if name is None else name * len(run)
