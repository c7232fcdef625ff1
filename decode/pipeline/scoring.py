"""A run of `decode.score`: pairs from files or standard input through forced decoding, a line of figures each.

Lines are written in input order, each as soon as it and all before it are done; memory does not grow with their number.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from corpora.text import display_name, iter_lines, open_binary
from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.sequence import Completion
from decode.pipeline.config import Options
from decode.pipeline.input import EncodedLine, encode_lines, group_available, open_lines, sequences_of
from decode.pipeline.members import EnsembleSpec
from decode.pipeline.output import DecodeProgress, OrderedWriter, check_writable
from decode.pipeline.report import finite
from minillama.errors import InputError, Interrupted

COLUMNS = ("line", "tokens", "logprob", "per_token", "perplexity")


def run(arguments: argparse.Namespace) -> int:
    """The whole command after its options are parsed; what can be refused is refused before weights are loaded."""
    source, translation, output = arguments.input, arguments.translation, arguments.output
    if source == translation == "-":
        raise InputError("--input and --translation are both standard input; one of them must be a file")
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    check_writable(output, [file for file in (source, translation) if file])
    with ExitStack() as stack:
        first, second = (translation, source) if translation == "-" else (source, translation)
        lines, ready = open_lines(first, stack)
        others = iter_lines(stack.enter_context(open_binary(second)), second) if second else None
        pairs = pair_lines(lines, others, display_name(first), second, swap=translation == "-")
        models = EnsembleSpec.from_arguments(arguments, options.batch_size)
        texts = display_name(translation or source)
        sum_of_models, where = models.describe()
        print(f"{sum_of_models}: scores of {texts}, {options.source} to {options.target}, {where}", file=sys.stderr)
        ensemble, seconds = models.load()
        print(f"loaded in {seconds:.1f} s", file=sys.stderr)
        scorer = Scorer(ensemble, options.batch_size, arguments.json)
        encoded = encode_lines(pairs, models.members, options, texts)
        scorer.write(group_available(encoded, options.batch_size, ready), output)
    print(scorer.summary(), file=sys.stderr)
    return 0


def pair_lines(
    lines: Iterable[str], others: Iterator[str] | None, first: str, second: str | None, swap: bool
) -> Iterator[list[str]]:
    """[sentence, translation] of each line: its two columns, or it and its partner in `others`; `swap`: reversed.

    first, second: the names of the two. Raises InputError at the first line that has no partner.
    """
    number = 0
    for number, text in enumerate(lines, 1):
        columns = text.split("\t") if others is None else [text, *islice(others, 1)]
        if len(columns) != 2 and others is None:
            raise InputError(f"{first}:{number}: expected 2 columns, found {len(columns)}")
        if len(columns) != 2:
            raise InputError(f"{second} ends before line {number} of {first}; they must be line-aligned")
        yield columns[::-1] if swap else columns
    if others is not None and any(True for _ in others):
        raise InputError(f"{first} ends after line {number}, {second} does not; they must be line-aligned")


class Scorer:
    """Scores groups of pairs and adds up what they have."""

    def __init__(self, ensemble: Ensemble, batch_size: int, as_json: bool) -> None:
        self.ensemble, self.batch_size, self.as_json = ensemble, batch_size, as_json
        self.columns = [*COLUMNS, *ensemble.names]
        self.lines = self.scored = self.tokens = 0
        self.totals = [0.0] * (1 + len(ensemble.names))  # log-probabilities in nats: combined, then each member's

    def write(self, groups: Iterable[list[EncodedLine]], output: str) -> None:
        progress = DecodeProgress(None)
        with OrderedWriter(output) as writer:
            if not self.as_json:
                writer.stream.write("\t".join(self.columns) + "\n")
            try:
                for group in groups:
                    for line, completion in self.score(group):
                        writer.put(line, self.row(line, completion))
                        progress.add(len(completion.logprobs) if completion else 0)
            except KeyboardInterrupt:
                where = "on standard output" if output == "-" else f"in {output}"
                raise Interrupted(f"interrupted: the figures of the first {writer.next:,} lines are {where}") from None
            finally:
                progress.stop()

    def score(self, group: Sequence[EncodedLine]) -> Iterator[tuple[int, Completion | None]]:
        """(line, result) as texts are done, None for a blank or skipped one."""
        self.lines += len(group)
        yield from ((line.number, None) for line in group if line.sequence is None)
        group = [line for line in group if line.sequence]
        sequences = sequences_of(group)
        if not sequences:
            return
        for index, completion in Engine.fitting(self.ensemble, sequences, self.batch_size).generate(sequences):
            self.scored += 1
            self.tokens += len(completion.logprobs)
            of_all = [completion.logprobs, *completion.member_logprobs]
            self.totals = [total + math.fsum(logprobs) for total, logprobs in zip(self.totals, of_all)]
            yield group[index].number, completion

    def row(self, line: int, completion: Completion | None) -> str:
        """A line of the output."""
        entry: dict[str, Any] = {"line": line + 1, "tokens": 0}
        members = {}
        if completion and completion.logprobs:
            members = dict(zip(self.ensemble.names, map(_figures, completion.member_logprobs)))
            entry |= _figures(completion.logprobs) | {"members": members}
        if self.as_json:
            return json.dumps(finite(entry))
        cells = entry | {name: figures["logprob"] for name, figures in members.items()}
        return "\t".join(_cell(cells.get(column, "")) for column in self.columns)

    def summary(self) -> str:
        if not self.tokens:
            return f"{self.lines:,} lines, nothing to score"
        per_token = [total / self.tokens for total in self.totals]
        listed = "; ".join(
            f"{name} {nats:.4f} nats per token, perplexity {_perplexity(nats):.3f}"
            for name, nats in zip(["combined", *self.ensemble.names], per_token)
        )
        return f"{self.scored:,} of {self.lines:,} lines, {self.tokens:,} tokens with ends: {listed}"


def _figures(logprobs: Sequence[float]) -> dict[str, Any]:
    total = math.fsum(logprobs)
    mean = total / len(logprobs)
    figures = {"tokens": len(logprobs), "logprob": total, "per_token": mean, "perplexity": _perplexity(mean)}
    return figures | {"logprobs": logprobs}


def _perplexity(per_token: float) -> float:
    return math.exp(-per_token) if per_token > -700 else math.inf


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
