"""Which examples each optimizer step trains on, on which rank, in which forward pass; examples from text and pairs.

An example is a document's token ids and its first label: the second token of plain text (CPT), the first after the
prompt of a pair (SFT). `Schedule` is a function of the examples and its settings alone, so a resumed run needs only its
step number, whatever its number of ranks.
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
from train.config import Settings
from train.packing import Batch, Example, best_fit, collate, pack

# Batches hold examples of similar length from windows of this many batches; the batches are then shuffled.
WINDOW = 32


def documents(
    texts: Sequence[str], tokenizer: Tokenizer, bos: int | None, eos: int | None, max_length: int
) -> list[Example]:
    """Text for CPT: begin, text, end; every token but the first is a label. Longer texts continue in a new example."""
    examples = []
    for text in texts:
        tokens = [*([] if bos is None else [bos]), *tokenizer.encode(text), *([] if eos is None else [eos])]
        for start in range(0, max(1, len(tokens) - 1), max_length - 1):
            chunk = tokens[start : start + max_length]
            if len(chunk) > 1:
                examples.append(Example(chunk, 1))
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
    """Pairs for SFT: the rendered prompt, then as labels the translation and the token that ends a turn."""
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


@dataclass(frozen=True)
class Schedule:
    """The micro-batches of every optimizer step: a deterministic function of the examples and the settings.

    packing     what `batch_size` and `micro_batch_size` count, and the layout of a forward pass:
      "off"     examples, right-padded to the longest of a micro-batch.
      "step"    examples, in the same optimizer steps as "off"; a micro-batch is one row without padding.
      "epoch"   sequences of up to `sequence_length` tokens, into which the shuffled epoch is packed best-fit; a
                micro-batch is one row of that many sequences. A longer example is a sequence of its own.
    micro_batch_size 0: all examples that a rank has in a step.
    rank, world_size: a step's examples (or sequences) are dealt to the ranks one at a time, so `batch_size`, the order
    and `num_labels` do not depend on the number of ranks. All ranks have equally many micro-batches in a step.
    """

    examples: Sequence[Example]
    settings: Settings
    rank: int = 0
    world_size: int = 1
    _steps: dict[int, list[list[list[int]]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def total_steps(self) -> int:
        return self._ends[-1]

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, position within it) of step 0..total_steps - 1."""
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's forward passes of one step, laid out on the CPU when they are requested."""
        sequences = self._sequences(step)
        size = self.settings.micro_batch_size or len(sequences)
        most = -(-len(sequences) // self.world_size)
        for number in range(-(-most // size)):
            examples = [self.examples[index] for index in self.indices_of(step, number)]
            if not examples:  # none is left for this rank, but every rank must take part in the collective calls
                example = self.examples[sequences[0][0]]
                examples = [replace(example, prompt_len=len(example.tokens))]
            yield self.layout(examples)

    def layout(self, examples: Sequence[Example]) -> Batch:
        """One forward pass over these examples, in the layout of `packing`."""
        return collate(examples) if self.settings.packing == "off" else pack(examples)

    def held_out(self, examples: Sequence[Example]) -> list[Batch]:
        """Forward passes for validation: examples of similar length together, `micro_batch_size` at a time."""
        order = sorted(examples, key=lambda example: len(example.tokens))
        size = self.settings.micro_batch_size or self.settings.batch_size
        return [self.layout(order[start : start + size]) for start in range(0, len(order), size)]

    def indices_of(self, step: int, number: int) -> list[int]:
        """The examples of this rank's micro-batch 0, 1, … of one step; empty if none is left for this rank."""
        sequences = self._sequences(step)
        size = self.settings.micro_batch_size or len(sequences)
        mine = sequences[self.rank :: self.world_size][number * size : (number + 1) * size]
        return [index for sequence in mine for index in sequence]

    def examples_of(self, step: int) -> list[Example]:
        """All ranks' examples of one step."""
        return [self.examples[index] for sequence in self._sequences(step) for index in sequence]

    def num_labels(self, step: int) -> int:
        """Labels of the step on all ranks: the divisor of its summed loss."""
        return sum(example.num_labels for example in self.examples_of(step))

    def num_tokens(self, step: int) -> int:
        return sum(len(example.tokens) for example in self.examples_of(step))

    def _sequences(self, step: int) -> list[list[int]]:
        """Indices of the examples of each sequence of one step; a sequence holds one unless packing is "epoch"."""
        epoch, position = self.epoch_of(step)
        return self._epoch(epoch)[position]

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(example.tokens) for example in self.examples]

    @cached_property
    def _ends(self) -> list[int]:
        """The number of steps until the end of each epoch."""
        if self.settings.packing == "epoch":
            return list(accumulate(len(self._epoch(epoch)) for epoch in range(self.settings.epochs)))
        steps = -(-len(self.examples) // self.settings.batch_size)
        return [steps * (epoch + 1) for epoch in range(self.settings.epochs)]

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """Steps of sequences of indices; the last requested epoch is cached."""
        if epoch not in self._steps:
            self._steps.clear()
            if self.settings.packing == "epoch":
                self._steps[epoch] = self._packed_epoch(epoch)
            else:
                order = epoch_order(self._lengths, self.settings.batch_size, self.settings.seed, epoch)
                self._steps[epoch] = [[[int(index)] for index in indices] for indices in order]
        return self._steps[epoch]

    def _packed_epoch(self, epoch: int) -> list[list[list[int]]]:
        generator = np.random.default_rng([self.settings.seed, epoch])
        order = generator.permutation(len(self.examples)).tolist()
        # the last token of an example is only a label, not an input
        bins = best_fit([self._lengths[index] - 1 for index in order], self.settings.sequence_length)
        sequences = [[order[position] for position in positions] for positions in bins]
        sequences = [sequences[i] for i in generator.permutation(len(sequences))]
        return [sequences[i : i + self.settings.batch_size] for i in range(0, len(sequences), self.settings.batch_size)]
