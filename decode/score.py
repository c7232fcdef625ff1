"""`python -m decode.score`: log-probabilities of given translations under an ensemble and under each of its members.

A line of source and a line of translation in, a line of figures out, in input order, each as soon as it and all before
it are done; memory does not grow with the number of lines. Prompts and chat formats are those of decode.collab. A
translation is tokenized as it is written: one that a model made may have been other tokens.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from corpora import iter_lines, language_name
from corpora.text import display_name, open_binary
from decode.collab import WINDOW_BATCHES
from decode.engine.ensemble import Ensemble
from decode.engine.expression import spell
from decode.engine.likelihood import Given, given_logprobs
from decode.pipeline.members import Options, Reader, encode_pair, load_ensemble, open_readers
from decode.options import add_model_options, named_folders
from decode.pipeline.output import OrderedWriter, check_writable
from decode.pipeline.placement import listed, per_member, places
from decode.pipeline.progress import DecodeProgress
from decode.pipeline.report import device_name, finite
from decode.pipeline.input import windows
from decode.pipeline.weights_file import combination
from minillama import InputError
from minillama.cli import Parser
from minillama.errors import Interrupted, exit_code

EXAMPLES = """examples:
  python -m decode.score --model L=demo/L --model S=demo/S_src --combine "L + 0.5*S" --source ja --target en \\
      --input src.txt --translation hyp.txt --output scores.tsv
  paste src.txt hyp.txt | python -m decode.score --model L=demo/L --source ja --target en --input - --json

columns: line (from 1); tokens, with the end of the text as one; logprob, their sum in nats under the combined
distribution; per_token; perplexity; then each member's own logprob. --json has the log-probability of every token too.
Lines that are blank or skipped have no figures.

A plain sum of logits is far too sure of itself: its log-probabilities rank the translations of one sentence, but say
little about how likely each is. Those under weights fitted by decode.tune (--weights) do; see docs/tuning.md.
"""
COLUMNS = ("line", "tokens", "logprob", "per_token", "perplexity")


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.score",
        description="Log-probabilities of given translations under a weighted sum of the logits of several Llamas.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    add = result.add_argument
    add(
        "--input",
        required=True,
        metavar="FILE",
        help="a sentence a line, or without --translation sentence, tab, translation; -: standard input, streamed",
    )
    add("--translation", metavar="FILE", help="the translations to be scored, line by line; -: standard input")
    add("--output", default="-", metavar="FILE", help="figures, a line each (default -: standard output)")
    add("--json", action="store_true", help="JSON lines, with every token's log-probability (default: columns)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts that are read together (default 16)")
    add(
        "--too-long",
        default="error",
        choices=("error", "skip"),
        help="what to do with a text that does not fit a context behind its prompt (default error)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    language_name(arguments.source), language_name(arguments.target)
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if arguments.input == arguments.translation == "-":
        raise InputError("--input and --translation are both standard input; one of them must be a file")
    folders = named_folders(arguments.model)
    weights = combination(arguments, list(folders))
    everywhere = places(arguments.device, arguments.dtype, list(folders), arguments.batch_size)
    there = {name: everywhere[name] for name in weights}
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    check_writable(arguments.output, [file for file in (arguments.input, arguments.translation) if file])
    prompts = per_member(arguments.prompt, list(folders), "--prompt")
    chats = per_member(arguments.chat, list(folders), "--chat")
    with ExitStack() as opened:
        # Whatever can be refused without the weights is refused before them.
        lines = pairs(arguments.input, arguments.translation, WINDOW_BATCHES * arguments.batch_size, opened)
        readers = open_readers({name: folders[name] for name in weights}, prompts, chats)
        sizes = ", ".join(f"{reader.name} {reader.checkpoint.parameters / 1e6:,.1f} M" for reader in readers)
        texts = arguments.translation or arguments.input
        places_of = listed({name: f"{place.storage}, {device_name(place.device)}" for name, place in there.items()})
        where = f"{options.source} to {options.target}, {places_of}"
        print(f"{spell(weights)} ({sizes}): scores of {display_name(texts)}, {where}", file=sys.stderr)
        ensemble, seconds = load_ensemble(readers, weights, there)
        print(f"loaded in {seconds:.1f} s", file=sys.stderr)
        scorer = Scorer(ensemble, readers, options, display_name(texts), arguments.json)
        scorer.write(lines, arguments.output)
    print(scorer.summary(), file=sys.stderr)
    return 0


def pairs(source: str, translation: str | None, largest: int, opened: ExitStack) -> Iterator[list[tuple[str, str]]]:
    """Groups of 1 to `largest` (sentence, translation); of standard input all that has arrived.

    Files are opened here and now, and closed with `opened`. Raises InputError at the first line that has no partner.
    """
    first, second = (translation, source) if translation == "-" else (source, translation)
    if first == "-":
        groups = windows(sys.stdin.fileno(), largest)
    else:
        stream = iter_lines(opened.enter_context(open_binary(first)), first)
        groups = iter(lambda: list(islice(stream, largest)), [])
    others = None if second is None else iter_lines(opened.enter_context(open_binary(second)), second)
    return _paired(groups, others, first, second, swap=translation == "-")


def _paired(
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


@dataclass
class Scorer:
    """Scores groups of lines and keeps the sums. `name`: of the texts, for messages."""

    ensemble: Ensemble
    readers: Sequence[Reader]
    options: Options
    name: str
    as_json: bool
    lines: int = 0
    scored: int = 0
    tokens: int = 0
    total: float = 0.0
    members: list[float] = field(default_factory=list)

    def write(self, groups: Iterator[list[tuple[str, str]]], output: str) -> None:
        progress = DecodeProgress(None)
        self.members = [0.0] * len(self.readers)
        with OrderedWriter(output) as writer:
            if not self.as_json:
                writer.stream.write("\t".join([*COLUMNS, *self.ensemble.names]) + "\n")
            try:
                for group in groups:
                    for line, given in self.score(group):
                        writer.put(line, self.row(line, given), translated=given is not None)
                        progress.add(len(given.logprobs) if given else 0)
            except KeyboardInterrupt:
                where = "on standard output" if output == "-" else f"in {output}"
                raise Interrupted(f"interrupted: the figures of the first {writer.next:,} lines are {where}") from None
            finally:
                progress.stop()

    def score(self, group: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Given | None]]:
        """(line, result) as texts are done; lines before one at fault are scored before it is raised."""
        numbers, prompts, targets = [], [], []
        fault: InputError | None = None
        for line, (sentence, translation) in enumerate(group, self.lines):
            try:
                where = f"{self.name}:{line + 1}"
                prompt, target = encode_pair(sentence, translation, self.readers, self.options, where)
            except InputError as error:
                fault = error
                break
            if prompt is None:
                yield line, None
                continue
            numbers.append(line)
            prompts.append(prompt)
            targets.append(target)
        self.lines += len(group)
        for given in given_logprobs(self.ensemble, prompts, targets, self.options.batch_size):
            self.scored += 1
            self.tokens += len(given.logprobs)
            self.total += math.fsum(given.logprobs)
            self.members = [sum_ + math.fsum(own) for sum_, own in zip(self.members, given.members)]
            yield numbers[given.index], given
        if fault is not None:
            raise fault

    def row(self, line: int, given: Given | None) -> str:
        """A line of the output."""
        names = self.ensemble.names
        if given is None or not given.logprobs:
            empty = {"line": line + 1, "tokens": 0}
            return json.dumps(empty) if self.as_json else "\t".join([str(line + 1), "0", *[""] * (3 + len(names))])
        figures = _figures(given.logprobs)
        if not self.as_json:
            own = [math.fsum(values) for values in given.members]
            floats = [figures["logprob"], figures["per_token"], figures["perplexity"], *own]
            return "\t".join([str(line + 1), str(figures["tokens"]), *(f"{value:.6g}" for value in floats)])
        members = {name: _figures(values) | {"logprobs": values} for name, values in zip(names, given.members)}
        entry = {"line": line + 1, **figures, "logprobs": given.logprobs, "members": members}
        return json.dumps(finite(entry))

    def summary(self) -> str:
        if not self.tokens:
            return f"{self.lines:,} lines, nothing to score"
        parts = [("combined", self.total), *zip(self.ensemble.names, self.members)]
        listed = "; ".join(
            f"{name} {total / self.tokens:.4f} nats a token, perplexity {_perplexity(total / self.tokens):.3f}"
            for name, total in parts
        )
        return f"{self.scored:,} of {self.lines:,} lines, {self.tokens:,} tokens with ends: {listed}"


def _figures(logprobs: Sequence[float]) -> dict[str, Any]:
    total, tokens = math.fsum(logprobs), len(logprobs)
    return {
        "tokens": tokens,
        "logprob": total,
        "per_token": total / tokens,
        "perplexity": _perplexity(total / tokens),
    }


def _perplexity(per_token: float) -> float:
    return math.exp(-per_token) if per_token > -700 else math.inf


if __name__ == "__main__":
    sys.exit(exit_code(main))
