"""The options of `python -m decode.tune`, and everything that can be refused before a weight is read."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corpora import language_name, read_lines
from corpora.pairs import is_blank
from corpora.text import display_name
from decode.engine.beam import MOST_BEAMS
from decode.engine.expression import parse
from decode.fitting.newton import Bounds
from decode.pipeline.members import Options, Reader, encode_pair, open_readers
from decode.options import add_model_options, named_folders, not_aligned
from decode.pipeline.output import check_writable
from decode.pipeline.placement import Place, per_member, places
from decode.fitting.hidden_states import Array
from decode.fitting.fit import rounded, spell_weights
from decode.pipeline.weights_file import combination
from minillama import InputError
from minillama.cli import Parser

EXAMPLES = """examples:
  python -m decode.tune --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --source ja --target en \\
      --input dev.ja --reference dev.en --output weights.toml
  python -m decode.collab --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --weights weights.toml \\
      --source ja --target en --input src.txt --output hyp.txt

Fit on text that neither trained the models nor will test them; a few hundred pairs are enough (docs/tuning.md).
exit codes: 0 done, 2 bad arguments or input, 130 interrupted, 1 a fault
"""
BEAMS, ROUNDS, LONGEST = 4, 6, 256


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.tune",
        description="Fit the weights of a sum of logits to translated text, by likelihood.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    add = result.add_argument_group("texts").add_argument
    add("--input", required=True, metavar="FILE", help="the sentences to fit on, one a line; -: standard input")
    add("--reference", required=True, metavar="FILE", help="their translations, line-aligned")
    add("--held-out", nargs=2, metavar=("SRC", "REF"), help="text on which every likelihood is given too")
    add("--output", metavar="FILE", help="write the weights here, for decode.collab --weights")
    add("--json", action="store_true", help="print all figures as JSON")
    add("--batch-size", type=int, default=16, metavar="N", help="pairs that are read together (default 16)")
    add(
        "--too-long",
        default="error",
        choices=("error", "skip"),
        help="what to do with a pair that does not fit a context (default error)",
    )
    add = result.add_argument_group("fit").add_argument
    add(
        "--l2",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="pull towards the weights of --combine: LAMBDA/2 times the squared distance, in nats a token (default 0)",
    )
    add("--bounds", metavar="LOW,HIGH", help="keep every weight within these, such as 0,inf (default: no bounds)")
    add(
        "--against",
        action="append",
        metavar="EXPR",
        help="a fixed expression to compare with, again for more (default: that of --combine, the plain sum, the first "
        "model with half of each other, each model alone)",
    )
    add(
        "--objective",
        default="likelihood",
        choices=("likelihood", "bleu"),
        help="bleu: go on from the likeliest weights to those with the highest BLEU of this text's translations, by "
        "rounds of beam search and a search over the n-best lists",
    )
    add("--beam", type=int, metavar="K", help=f"for bleu: hypotheses of a list, 2 to {MOST_BEAMS} (default {BEAMS})")
    add("--rounds", type=int, metavar="N", help=f"for bleu: translations after the first two (default {ROUNDS})")
    add("--max-new-tokens", type=int, metavar="N", help=f"for bleu: longest translation (default {LONGEST})")
    add("--starts", type=int, default=0, metavar="N", help="fit again from N random starts and say how far they end")
    add("--seed", type=int, default=0, metavar="N", help="of random starts and of the search (default 0)")
    add("--curve", metavar="N,N,…", help="also fit on the first N pairs: what more text would bring")
    return result


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs and their references as text; how many lines were blank and which (from 1) were too long."""

    prompts: list[tuple[list[int], ...]]
    targets: list[list[int]]
    references: list[str]
    blank: int
    skipped: list[int]

    def describe(self) -> str:
        parts = [f"{len(self.targets):,} pairs"]
        parts += [f"{self.blank:,} blank"] if self.blank else []
        parts += [f"{len(self.skipped):,} too long (line {self.skipped[0]}…)"] if self.skipped else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Job:
    """A checked run: all that is known before weights are loaded."""

    arguments: argparse.Namespace
    folders: dict[str, str]
    readers: list[Reader]
    places: dict[str, Place]
    centre_N: Array
    bounds: Bounds
    against: dict[str, Array]
    curve: list[int]
    pairs: Pairs
    held_out: Pairs | None

    @property
    def names(self) -> list[str]:
        return list(self.folders)


def prepare(arguments: argparse.Namespace) -> Job:
    """Everything cheap, and everything that can be refused."""
    language_name(arguments.source), language_name(arguments.target)
    for name in ("batch_size", "starts", "seed"):
        least = int(name == "batch_size")
        if getattr(arguments, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")
    if not 0 <= arguments.l2 < float("inf"):
        raise InputError(f"--l2 {arguments.l2:g}: expected a number of 0 or more")
    _check_bleu(arguments)
    folders = named_folders(arguments.model)
    names = list(folders)
    centre_N = _vector(combination(arguments, names), names)
    bounds = _bounds(arguments.bounds, len(names))
    against = _against(arguments.against, names, centre_N)
    curve = _counts(arguments.curve)
    where = places(arguments.device, arguments.dtype, names, arguments.batch_size)
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    files = [arguments.input, arguments.reference, *(arguments.held_out or ())]
    if files.count("-") > 1:
        raise InputError("standard input is given more than once; only one text can be read from it")
    if arguments.output == "-":
        raise InputError("--output -: give a file; standard output is for figures")
    if arguments.output:
        check_writable(arguments.output, files)
    prompts = per_member(arguments.prompt, names, "--prompt")
    readers = open_readers(folders, prompts, per_member(arguments.chat, names, "--chat"))
    pairs = read(arguments.input, arguments.reference, readers, options)
    held_out = None
    if arguments.held_out:
        held_out = read(arguments.held_out[0], arguments.held_out[1], readers, options)
    _check_curve(curve, len(pairs.targets), held_out is not None)
    return Job(arguments, folders, readers, where, centre_N, bounds, against, curve, pairs, held_out)


def read(source: str, reference: str, readers: Sequence[Reader], options: Options) -> Pairs:
    """Raises InputError for files that are not line-aligned, and for those without a pair."""
    sentences, translations = read_lines(source), read_lines(reference)
    if len(sentences) != len(translations):
        raise not_aligned(display_name(source), len(sentences), display_name(reference), len(translations))
    found = Pairs([], [], [], sum(map(is_blank, sentences, translations)), [])
    for line, (sentence, translation) in enumerate(zip(sentences, translations), 1):
        if is_blank(sentence, translation):
            continue
        prompts, target = encode_pair(sentence, translation, readers, options, f"{display_name(reference)}:{line}")
        if prompts is None:
            found.skipped.append(line)
            continue
        found.prompts.append(prompts)
        found.targets.append(target)
        found.references.append(translation)
    if not found.targets:
        raise InputError(f"{display_name(source)}: no pairs to fit on, expected sentences with translations")
    return found


def _check_bleu(arguments: argparse.Namespace) -> None:
    for name, least, most in (("beam", 2, MOST_BEAMS), ("rounds", 0, None), ("max_new_tokens", 1, None)):
        option, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if value is None:
            continue
        if arguments.objective != "bleu":
            raise InputError(f"{option} has no effect without --objective bleu; give that too")
        if value < least or (most is not None and value > most):
            raise InputError(f"{option} {value}: expected {least} or more" + (f", up to {most}" if most else ""))


def _vector(weights: dict[str, float], names: Sequence[str]) -> Array:
    return np.array([weights.get(name, 0.0) for name in names])


def _bounds(text: str | None, count: int) -> Bounds:
    if text is None:
        return Bounds.none(count)
    try:
        low, high = (rounded(float(part)) for part in text.split(","))
    except ValueError:
        raise InputError(f"--bounds {text}: expected LOW,HIGH, such as 0,1 or -0.5,inf") from None
    if not low <= high or low == float("inf") or high == -float("inf"):
        raise InputError(f"--bounds {text}: expected two numbers, the first not above the second")
    return Bounds(np.full(count, low), np.full(count, high))


def _against(expressions: Sequence[str] | None, names: Sequence[str], centre_N: Array) -> dict[str, Array]:
    """Weights by expression. By default what one would try by hand."""
    first, *others = names
    if expressions is None:
        halves = [f"{first} + " + " + ".join(f"0.5*{name}" for name in others)] if others else []
        expressions = [spell_weights(centre_N, names), " + ".join(names), *halves, *names]
    return {text: _vector(parse(text, names, all_used=False), names) for text in dict.fromkeys(expressions)}


def _counts(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise InputError(f"--curve {text}: expected numbers of pairs such as 10,50,200")
    return counts


def _check_curve(counts: Sequence[int], pairs: int, has_held_out: bool) -> None:
    if not counts or counts[-1] < pairs or (has_held_out and counts[-1] == pairs):
        return
    if counts[-1] > pairs:
        raise InputError(f"--curve {counts[-1]}: there are {pairs:,} pairs")
    raise InputError(f"--curve {counts[-1]}: with all {pairs:,} pairs none is left to judge by; give --held-out")
