"""Texts in: lines of a file, or of standard input as they arrive, encoded for the engine and grouped."""

import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from corpora.text import iter_lines, open_binary
from decode.engine.sequence import Sequence
from decode.pipeline.config import Options
from decode.pipeline.members import MemberSpec, encode_sentence
from minillama.errors import InputError

T = TypeVar("T")
CHUNK_BYTES = 1 << 16
# Most batches in a group of lines: a large group fills the slots, a small one needs less memory.
GROUP_BATCHES = 16


class LineSource:
    """The raw lines of a file descriptor; iteration waits for the next complete one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lines: list[bytes] = []  # complete lines, the next one last
        self.partial = b""
        self.ended = False

    def __iter__(self) -> Iterator[bytes]:
        while self.ready(wait=True):
            yield self.lines.pop()

    def ready(self, wait: bool = False) -> bool:
        """Read what the descriptor has, or with `wait` until a line is complete; returns whether one is."""
        while not self.lines and not self.ended and (wait or select.select([self.descriptor], [], [], 0)[0]):
            chunk = os.read(self.descriptor, CHUNK_BYTES)
            *lines, self.partial = (self.partial + chunk).split(b"\n")
            self.lines = [line + b"\n" for line in reversed(lines)]
            if not chunk:
                self.ended = True
                self.lines = [self.partial] if self.partial else []
        return bool(self.lines)


def open_lines(path: str, stack: ExitStack) -> tuple[Iterator[str], Callable[[], bool]]:
    """The lines of a file, which `stack` closes, or of standard input; and whether the next needs no waiting."""
    if path != "-":
        return iter_lines(stack.enter_context(open_binary(path)), path), lambda: True
    source = LineSource(sys.stdin.fileno())
    return iter_lines(source, "standard input"), source.ready


def group_available(items: Iterator[T], batch_size: int, ready: Callable[[], bool]) -> Iterator[list[T]]:
    """Groups of one item to GROUP_BATCHES batches: all that are ready by the time the consumer requests them.

    An InputError of `items` is raised after the items before it.
    """
    for item in items:
        group = [item]
        fault = None
        try:
            while len(group) < GROUP_BATCHES * batch_size and ready():
                group.append(next(items))
        except StopIteration:
            pass
        except InputError as error:
            fault = error
        yield group
        if fault is not None:
            raise fault


@dataclass(frozen=True, slots=True)
class EncodedLine:
    """A line of input, `number` from 0. sequence: None for a line that is blank or skipped; its key is the number.

    too_long: "skipped" or "truncated" where the sentence does not fit a context.
    """

    number: int
    text: str
    sequence: Sequence | None
    too_long: str = ""


def encode_lines(
    lines: Iterable[SequenceOf[str]], members: SequenceOf[MemberSpec], options: Options, name: str
) -> Iterator[EncodedLine]:
    """lines: of a sentence, or of a sentence and a translation whose log-probabilities are requested.   name: of the
    text, for messages. Raises InputError at a line that is refused because it fits no context.
    """
    params, most = options.sampling_params, options.max_new_tokens
    for number, (sentence, *translation) in enumerate(lines):
        target = members[0].tokenizer.encode(translation[0].strip()) if translation else None
        new_tokens = 1 if target is None else len(target)
        prompts, too_long = encode_sentence(sentence, new_tokens, members, options, f"{name}:{number + 1}")
        sequence = None
        if prompts:  # samples depend on the key, so the batch does not change them
            sequence = Sequence(prompts, params, most, key=number, explain=options.explain, targets=target)
        yield EncodedLine(number, sentence, sequence, too_long)


def sequences_of(lines: Iterable[EncodedLine]) -> list[Sequence]:
    return [line.sequence for line in lines if line.sequence is not None]


def check_aligned(source: str, lines: int, reference: str, others: int) -> None:
    if lines != others:
        raise InputError(f"{source} has {lines:,} lines, {reference} has {others:,}; they must be line-aligned")
