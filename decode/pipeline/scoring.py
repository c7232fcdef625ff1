"""A run of `decode.score`: pairs from files or standard input through forced decoding, a line of figures each.

Lines are written in input order, each as soon as it and all before it are done; memory does not grow with their number.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from corpora import iter_lines
from corpora.text import display_name, open_binary
from decode.engine.ensemble import Ensemble
from decode.engine.generate import score
from decode.engine.sequence import Completion
from decode.pipeline.config import Options
from decode.pipeline.input import GROUP_BATCHES, read_available_lines
from decode.pipeline.members import EnsembleSpec, MemberSpec, encode_pair
from decode.pipeline.output import DecodeProgress, OrderedWriter, check_writable
from decode.pipeline.report import finite
from minillama.errors import InputError, Interrupted

COLUMNS = ("line", "tokens", "logprob", "per_token", "perplexity")


def run(arguments: argparse.Namespace) -> int:
    """The whole command after its options are parsed; what can be refused is refused before weights are loaded."""
    if arguments.input == arguments.translation == "-":
        raise InputError("--input and --translation are both standard input; one of them must be a file")
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    check_writable(arguments.output, [file for file in (arguments.input, arguments.translation) if file])
    with ExitStack() as stack:
        groups = read_pairs(arguments.input, arguments.translation, GROUP_BATCHES * arguments.batch_size, stack)
        models = EnsembleSpec.from_arguments(arguments, arguments.batch_size)
        texts = display_name(arguments.translation or arguments.input)
        sum_of_models, where = models.describe()
        print(f"{sum_of_models}: scores of {texts}, {options.source} to {options.target}, {where}", file=sys.stderr)
        ensemble, seconds = models.load()
        print(f"loaded in {seconds:.1f} s", file=sys.stderr)
        scorer = Scorer(ensemble, models.members, options, texts, arguments.json)
        scorer.write(groups, arguments.output)
    print(scorer.summary(), file=sys.stderr)
    return 0


def read_pairs(source: str, translation: str | None, most: int, stack: ExitStack) -> Iterator[list[tuple[str, str]]]:
    """Groups of 1 to `most` (sentence, translation); of standard input all that has arrived.

    Files are opened now, and closed with `stack`. Raises InputError at the first line that has no partner.
    """
    first, second = (translation, source) if translation == "-" else (source, translation)
    if first == "-":
        groups = read_available_lines(sys.stdin.fileno(), most)
    else:
        stream = iter_lines(stack.enter_context(open_binary(first)), first)
        groups = iter(lambda: list(islice(stream, most)), [])
    others = None if second is None else iter_lines(stack.enter_context(open_binary(second)), second)
    return _pair(groups, others, first, second, swap=translation == "-")


def _pair(
    groups: Iterator[list[str]], others: Iterator[str] | None, first: str, second: str | None, swap: bool
) -> Iterator[list[tuple[str, str]]]:
    line = 0
    for group in groups:
        found: list[tuple[str, str]] = []
        fault = ""
        for text in group:
            line += 1
            columns = text.split("\t") if others is None else [text, *islice(others, 1)]
            if len(columns) != 2:
                fault = f"{display_name(first)}:{line}: expected 2 columns, found {len(columns)}"
                if second is not None:
                    fault = f"{second} ends before line {line} of {display_name(first)}; they must be line-aligned"
                break
            found.append((columns[1], columns[0]) if swap else (columns[0], columns[1]))
        if found:
            yield found
        if fault:
            raise InputError(fault)
    if others is not None and any(True for _ in others):
        raise InputError(f"{display_name(first)} ends after line {line}, {second} does not; they must be line-aligned")


class Scorer:
    """Scores groups of pairs and keeps the sums. `name`: of the texts, for messages."""

    def __init__(
        self, ensemble: Ensemble, members: Sequence[MemberSpec], options: Options, name: str, as_json: bool
    ) -> None:
        self.ensemble, self.members, self.options, self.name, self.as_json = ensemble, members, options, name, as_json
        self.columns = [*COLUMNS, *ensemble.names]
        self.lines = self.scored = self.tokens = 0
        self.totals = [0.0] * (1 + len(members))  # log-probabilities in nats: combined, then of each member

    def write(self, groups: Iterator[list[tuple[str, str]]], output: str) -> None:
        progress = DecodeProgress(None)
        with OrderedWriter(output) as writer:
            if not self.as_json:
                writer.stream.write("\t".join(self.columns) + "\n")
            try:
                for group in groups:
                    for line, completion in self.score(group):
                        writer.put(line, self.row(line, completion), translated=completion is not None)
                        progress.add(len(completion.logprobs) if completion else 0)
            except KeyboardInterrupt:
                where = "on standard output" if output == "-" else f"in {output}"
                raise Interrupted(f"interrupted: the figures of the first {writer.next:,} lines are {where}") from None
            finally:
                progress.stop()

    def score(self, group: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Completion | None]]:
        """(line, result) as texts are done, None for a blank or skipped one; lines before a refused one come first."""
        lines, prompts, targets = [], [], []
        fault: InputError | None = None
        for line, (sentence, translation) in enumerate(group, self.lines):
            try:
                where = f"{self.name}:{line + 1}"
                prompt, target = encode_pair(sentence, translation, self.members, self.options, where)
            except InputError as error:
                fault = error
                break
            if prompt is None:
                yield line, None
                continue
            lines.append(line)
            prompts.append(prompt)
            targets.append(target)
        self.lines += len(group)
        for index, completion in score(self.ensemble, prompts, targets, self.options.batch_size):
            self.scored += 1
            self.tokens += len(completion.logprobs)
            of_all = [completion.logprobs, *completion.member_logprobs]
            self.totals = [total + math.fsum(logprobs) for total, logprobs in zip(self.totals, of_all)]
            yield lines[index], completion
        if fault is not None:
            raise fault

    def row(self, line: int, completion: Completion | None) -> str:
        """A line of the output."""
        entry: dict[str, Any] = {"line": line + 1, "tokens": 0}
        members = {}
        if completion and completion.logprobs:
            entry |= _figures(completion.logprobs)
            members = dict(zip(self.ensemble.names, completion.member_logprobs))
        if not self.as_json:
            cells = entry | {name: math.fsum(logprobs) for name, logprobs in members.items()}
            return "\t".join(_cell(cells.get(column, "")) for column in self.columns)
        if completion and members:
            by_member = {name: _figures(logprobs) | {"logprobs": logprobs} for name, logprobs in members.items()}
            entry |= {"logprobs": completion.logprobs, "members": by_member}
        return json.dumps(finite(entry))

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
    total, tokens = math.fsum(logprobs), len(logprobs)
    per_token = total / tokens
    return {"tokens": tokens, "logprob": total, "per_token": per_token, "perplexity": _perplexity(per_token)}


def _perplexity(per_token: float) -> float:
    return math.exp(-per_token) if per_token > -700 else math.inf


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
