"""`--dry-run`: the plan of a run and its first samples as the model would see them, with nothing written."""

from collections.abc import Sequence
from itertools import groupby

from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer
from train.config import Settings
from train.data import Schedule
from train.distributed import DistributedContext
from train.memory import memory_of
from train.packing import Example

# Steps that are laid out to measure how full their forward passes are.
MEASURED_STEPS = 50


def show(
    config: LlamaConfig,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    settings: Settings,
    world: DistributedContext,
) -> None:
    """Print examples, tokens, steps, density, memory, and the first examples with their labels between « and »."""
    schedule = Schedule(examples, settings, world.rank, world.size)
    measured = range(min(MEASURED_STEPS, schedule.total_steps))
    batches = [batch for step in measured for batch in schedule.micro_batches(step)]
    sizes = [batch.inputs_BT.numel() for batch in batches]
    density = sum(schedule.num_tokens(step) for step in measured) / world.size / sum(sizes)
    tokens, labels = sum(len(e.tokens) for e in examples), sum(e.num_labels for e in examples)
    print(f"examples    {len(examples):,}: {tokens:,} tokens, {labels / tokens:.0%} of them targets")
    print(f"steps       {schedule.total_steps:,} in {settings.epochs} epochs")
    print(f"packing     {settings.packing}; {sum(sizes) / len(sizes):,.0f} positions per forward, {world.size} rank(s)")
    print(f"density     {density:.2f} tokens per position; padding lowers it, a shared prefix raises it")
    labels = max(len(batch.labels_M) for batch in batches)
    print(memory_of(config, settings, max(sizes), labels, world.size, world.device.type))
    for number, example in enumerate(schedule.examples_of(0)[:3], 1):
        prompt, response = example.tokens[: example.prompt_len], example.tokens[example.prompt_len :]
        print(f"\nsample {number}: {len(example.tokens)} tokens")
        print(f"{_readable(prompt, tokenizer)}«{_readable(response, tokenizer)}»")


def _readable(tokens: list[int], tokenizer: Tokenizer) -> str:
    """The text of the tokens, control tokens by name."""
    names = {token: name for name, token in tokenizer.specials.items()}
    runs = ((name, list(run)) for name, run in groupby(tokens, key=names.get))
    return "".join(tokenizer.decode(run) if name is None else name * len(run) for name, run in runs)
