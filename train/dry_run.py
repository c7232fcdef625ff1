"""`--dry-run`: the plan of a run and its first samples as the model would see them, with nothing written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.text import Text

from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer
from train.config import Settings
from train.data import Schedule
from train.distributed import DistributedContext
from train.memory import memory_of
from train.packing import Example

SAMPLES = 3
# Steps that are laid out to measure how full their forward passes are.
MEASURED_STEPS = 50


def show(
    config: LlamaConfig,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    settings: Settings,
    world: DistributedContext,
) -> None:
    """Print examples, tokens, steps, density, memory, and three samples with their labels in colour."""
    console = Console(highlight=False, soft_wrap=True)
    schedule = Schedule(examples, settings, world.rank, world.size)
    measured = range(min(MEASURED_STEPS, schedule.total_steps))
    batches = [batch for step in measured for batch in schedule.micro_batches(step)]
    sizes = [batch.inputs_BT.numel() for batch in batches]
    tokens, labels = sum(len(e.tokens) for e in examples), sum(e.num_labels for e in examples)
    epochs = [f"{schedule.steps_in_epoch(epoch):,}" for epoch in range(settings.epochs)]
    for name, text in (
        ("examples", f"{len(examples):,}"),
        ("tokens", f"{tokens:,}, {labels / tokens:.0%} of them targets"),
        ("steps", f"{schedule.total_steps:,}; by epoch {', '.join(epochs[:5])}{', …' if len(epochs) > 5 else ''}"),
        ("ranks", f"{world.size}, on {world.device.type}"),
        ("packing", f"{settings.packing}; {sum(sizes) / len(sizes):,.0f} positions in a forward pass"),
        ("density", density(Schedule(examples, settings), measured)),
    ):
        console.print(f"{name:12}{text}")
    most = max(len(batch.labels_M) for batch in batches)
    for line in memory_of(config, settings, max(sizes), most, world.size, world.device.type).lines():
        console.print(line)
    single = Schedule(examples, replace(settings, micro_batch_size=1))
    for number in range(SAMPLES):
        sample = [examples[index] for index in single.indices_of(0, number)]
        if sample:
            length = sum(len(example.tokens) for example in sample)
            console.print(f"\nsample {number + 1}: {length} tokens, {len(sample)} example(s)", style="bold")
        for example in sample:
            console.print(highlighted(example, tokenizer, console.is_terminal))


def density(schedule: Schedule, steps: range) -> str:
    """The share of computed positions that are not padding, over some steps of all ranks."""
    needed = sum(len(example.tokens) - 1 for step in steps for example in schedule.examples_of(step))
    computed = sum(batch.inputs_BT.numel() for step in steps for batch in schedule.micro_batches(step))
    if computed < needed:
        text = f"no padding; a shared prefix, computed once, saves {1 - computed / needed:.0%}"
    else:
        text = f"{needed / computed:.1%}, {1 - needed / computed:.1%} padding"
    if schedule.settings.packing == "epoch":
        single = replace(schedule, settings=replace(schedule.settings, micro_batch_size=1))
        length = schedule.settings.sequence_length
        room = sum(1 for step in steps for _ in single.micro_batches(step)) * length
        text += f"; sequences of {length:,} are {needed / room:.1%} full"
    return text


def highlighted(example: Example, tokenizer: Tokenizer, colour: bool) -> Text:
    """The example's text, control tokens by name; its labels in colour, or between « and »."""
    prompt = "".join(_readable(example.tokens[: example.prompt_len], tokenizer))
    labels = "".join(_readable(example.tokens[example.prompt_len :], tokenizer))
    if colour:
        return Text(prompt, style="dim").append(labels, style="bold green not dim")
    return Text(f"{prompt}«{labels}»")


def _readable(tokens: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    names = {token: name for name, token in tokenizer.specials.items()}
    for name, group in groupby(tokens, key=names.get):
        run = list(group)
        yield tokenizer.decode(run) if name is None else name * len(run)
