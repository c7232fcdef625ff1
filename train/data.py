"""Training examples, and which of them each optimizer step sees, on which rank, in which forward pass.

An example is a document's token ids and where its targets begin: at its second token for plain text (CPT), behind the
prompt for pairs (SFT). `Schedule` is a function of the examples and its settings alone, so a resumed run needs only its
step number, whatever the number of ranks it goes on with.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from corpora import Pairs, Prompt
from minillama.chat import ChatFormat, render, stop_tokens
from minillama.tokenizer import Tokenizer
from train.packing import Batch, best_fit, collate, pack

# Examples are put into batches of like length within windows of this many batches; the batches are then shuffled.
WINDOW = 32
PACKINGS = ("off", "step", "epoch")


@dataclass(frozen=True)
class Example:
    """Token ids, of which those from `first_target` on are to be predicted."""

    tokens: list[int]
    first_target: int

    @property
    def targets(self) -> int:
        return len(self.tokens) - self.first_target


def documents(
    texts: Sequence[str], tokenizer: Tokenizer, bos: int | None, eos: int | None, max_length: int
) -> list[Example]:
    """Text for CPT: begin, text, end; every token but the first is a target. Longer texts go on in a new example."""
    examples = []
    for text in texts:
        tokens = [*([] if bos is None else [bos]), *tokenizer.encode(text), *([] if eos is None else [eos])]
        for start in range(0, max(1, len(tokens) - 1), max_length - 1):
            part = tokens[start : start + max_length]
            if len(part) > 1:
                examples.append(Example(part, 1))
    return examples


def responses(
    pairs: Pairs,
    languages: tuple[str, str],
    prompt: Prompt,
    chat: ChatFormat,
    tokenizer: Tokenizer,
    bos: int | None,
    eos: int | None,
) -> list[Example]:
    """Pairs for SFT: the rendered prompt, then as targets the translation and the token that ends a turn."""
    end = stop_tokens(chat, tokenizer) or (() if eos is None else (eos,))
    examples = []
    for source, target in zip(pairs.source, pairs.target):
        head = render(prompt.messages(source, *languages), chat, tokenizer, bos)
        examples.append(Example([*head, *tokenizer.encode(target), *end], len(head)))
    return examples


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of each optimizer step's examples in one epoch: shuffled, then sorted by length within a window.

    Every example is seen once. The last batch may be smaller.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    length_of = np.asarray(lengths)
    batches = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = order[start : start + WINDOW * batch_size]
        window = window[np.argsort(length_of[window], kind="stable")]
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@dataclass(frozen=True)
class Schedule:
    """Every optimizer step's micro-batches: a deterministic function of the examples and of what stands here.

    packing     what `batch_size` and `micro_batch_size` count, and how a forward pass is laid out:
      "off"     examples, right-padded to the longest of a micro-batch.
      "step"    examples, as above, so the optimizer steps are the same; a micro-batch is one row without padding.
      "epoch"   sequences of up to `sequence_length` tokens, into which the shuffled epoch is packed best-fit; a
                micro-batch is one row of that many sequences. A longer example is a sequence of its own.
    micro_batch_size 0: all that a rank has of a step at once.
    rank, world_size: a step's examples (or sequences) are dealt to the ranks in turn, so `batch_size`, the order, and
    `targets` do not depend on the number of ranks. All ranks have the same number of micro-batches in a step.
    """

    examples: Sequence[Example]
    epochs: int
    batch_size: int
    micro_batch_size: int = 0
    packing: str = "step"
    sequence_length: int = 2048
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    _steps: dict[int, list[list[list[int]]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"packing is {self.packing!r}; it must be one of {', '.join(PACKINGS)}")

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of epoch 0, 1, …; with packing "epoch" they may differ by a few."""
        return self._ends[epoch] - (self._ends[epoch - 1] if epoch else 0)

    @property
    def total_steps(self) -> int:
        return self._ends[-1]

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, position within it) of step 0..total_steps - 1."""
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's forward passes of one step, collated on the CPU as they are asked for."""
        sequences = self._sequences(step)
        mine = sequences[self.rank :: self.world_size]
        size = self.micro_batch_size or len(sequences)
        most = -(-len(sequences) // self.world_size)
        for start in range(0, most, size):
            part = [self.examples[i] for sequence in mine[start : start + size] for i in sequence]
            if not part:  # this rank has run out, but every rank must go through the same collectives
                example = self.examples[sequences[0][0]]
                part = [replace(example, first_target=len(example.tokens))]
            yield self.layout(part)

    def layout(self, examples: Sequence[Example]) -> Batch:
        """One forward pass over these examples, padded or packed as the run's are."""
        return collate(examples) if self.packing == "off" else pack(examples)

    def held_out(self, examples: Sequence[Example]) -> list[Batch]:
        """Forward passes for validation: examples of like length together, `micro_batch_size` of them at a time."""
        order = sorted(examples, key=lambda example: len(example.tokens))
        return [self.layout(part) for part in micro_batches(order, self.micro_batch_size or self.batch_size)]

    def indices_of(self, step: int, number: int) -> list[int]:
        """Which examples this rank's micro-batch 0, 1, … of one step holds; none where the rank has run out."""
        sequences = self._sequences(step)
        size = self.micro_batch_size or len(sequences)
        mine = sequences[self.rank :: self.world_size][number * size : (number + 1) * size]
        return [index for sequence in mine for index in sequence]

    def examples_of(self, step: int) -> list[Example]:
        """All ranks' examples of one step."""
        return [self.examples[index] for sequence in self._sequences(step) for index in sequence]

    def targets(self, step: int) -> int:
        """Targets of the step on all ranks: what its summed loss is divided by."""
        return sum(example.targets for example in self.examples_of(step))

    def tokens(self, step: int) -> int:
        return sum(len(example.tokens) for example in self.examples_of(step))

    def _sequences(self, step: int) -> list[list[int]]:
        """Indices of the examples of each sequence of one step; without packing over the epoch each holds one."""
        epoch, position = self.epoch_of(step)
        return self._epoch(epoch)[position]

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(example.tokens) for example in self.examples]

    @cached_property
    def _ends(self) -> list[int]:
        """The number of steps up to the end of each epoch."""
        if self.packing == "epoch":
            return list(accumulate(len(self._epoch(epoch)) for epoch in range(self.epochs)))
        return [-(-len(self.examples) // self.batch_size) * (epoch + 1) for epoch in range(self.epochs)]

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """Steps of sequences of indices; one epoch is kept."""
        if epoch not in self._steps:
            self._steps.clear()
            if self.packing == "epoch":
                self._steps[epoch] = self._packed_epoch(epoch)
            else:
                order = epoch_order(self._lengths, self.batch_size, self.seed, epoch)
                self._steps[epoch] = [[[int(index)] for index in indices] for indices in order]
        return self._steps[epoch]

    def _packed_epoch(self, epoch: int) -> list[list[list[int]]]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.examples)).tolist()
        # the last token of an example is only ever a target, so it takes no place
        bins = best_fit([self._lengths[index] - 1 for index in order], self.sequence_length)
        sequences = [[order[place] for place in places] for places in bins]
        sequences = [sequences[i] for i in generator.permutation(len(sequences))]
        return [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]
