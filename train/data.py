"""Training examples, and the order in which they are seen.

An example is a document's token ids and where its targets begin: at its second token for plain text (CPT), behind the
prompt for pairs (SFT). The order is a function of (seed, epoch) alone, so a resumed run needs only its step number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corpora import Pairs, Prompt
from minillama.chat import ChatFormat, render, stop_tokens
from minillama.tokenizer import Tokenizer

# Examples are put into batches of like length within windows of this many batches; the batches are then shuffled.
WINDOW = 32


@dataclass(frozen=True)
class Example:
    """Token ids, of which those from `first_target` on are to be predicted."""

    tokens: list[int]
    first_target: int

    @property
    def targets(self) -> int:
        return len(self.tokens) - self.first_target


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. target_rows_M index the flattened (B*T) hidden states that predict targets_M; all int64."""

    inputs_BT: Tensor
    target_rows_M: Tensor
    targets_M: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.inputs_BT.to(device), self.target_rows_M.to(device), self.targets_M.to(device))


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


def collate(examples: Sequence[Example]) -> Batch:
    """Right-padded inputs, and the places of the hidden states that predict a target.

    The last token of an example is only ever a target, so inputs are one token shorter than the examples.
    """
    width = max(len(example.tokens) for example in examples) - 1
    inputs = np.zeros((len(examples), width), dtype=np.int64)
    rows, targets = [], []
    for number, example in enumerate(examples):
        tokens = np.asarray(example.tokens, dtype=np.int64)
        inputs[number, : len(tokens) - 1] = tokens[:-1]
        rows.append(np.arange(example.first_target - 1, len(tokens) - 1) + number * width)
        targets.append(tokens[example.first_target :])
    return Batch(*(torch.from_numpy(array) for array in (inputs, np.concatenate(rows), np.concatenate(targets))))


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
