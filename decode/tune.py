"""`python -m decode.tune`: fit an ensemble's weights to translated text by maximum likelihood.

The negative log-likelihood of the references is convex in the weights (see fitting/hidden_states.py), so Newton's
method finds the minimum and proves it: the gradient is zero and the Hessian positive definite. Each member reads every
pair once; a step costs output layers alone. torch is imported by `run`, not for --help.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from corpora import language_name, read_lines
from corpora.pairs import is_blank
from corpora.text import display_name
from decode.arguments import add_model_options, named_folders, not_aligned
from decode.engine.expression import parse
from decode.fitting.fit import best_scale, compare, describe, fit_weights, format_sum, report_lines, rounded
from decode.fitting.newton import Array, Bounds
from decode.pipeline.config import Options
from decode.pipeline.weights_file import combination, write_weights
from minillama.cli import Parser
from minillama.errors import InputError, exit_code

if TYPE_CHECKING:
    from decode.pipeline.members import MemberSpec

EXAMPLES = """examples:
  python -m decode.tune --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --source ja --target en \\
      --input dev.ja --reference dev.en --output weights.toml
  python -m decode.collab --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --weights weights.toml \\
      --source ja --target en --input src.txt --output hyp.txt

Fit on text that neither trained the models nor will test them; a few hundred pairs are enough (docs/tuning.md).
exit codes: 0 done, 2 bad arguments or input, 130 interrupted, 1 a fault
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.tune",
        description="Fit the weights of a sum of logits to translated text, by maximum likelihood.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    add = result.add_argument_group("texts").add_argument
    add("--input", required=True, metavar="FILE", help="the sentences to fit on, one a line; -: standard input")
    add("--reference", required=True, metavar="FILE", help="their translations, line-aligned")
    add("--held-out", nargs=2, metavar=("SRC", "REF"), help="other text; its likelihoods are reported too")
    add("--output", metavar="FILE", help="write the weights here, for decode.collab --weights")
    add("--json", action="store_true", help="print all figures as JSON")
    add("--batch-size", type=int, default=16, metavar="N", help="pairs that are read together (default 16)")
    too_long = "what to do with a pair that does not fit a context (default error)"
    add("--too-long", default="error", choices=("error", "skip"), help=too_long)
    add = result.add_argument_group("fit").add_argument
    l2 = "penalty: LAMBDA/2 times the squared distance to the weights of --combine, in nats per token (default 0)"
    add("--l2", type=float, default=0.0, metavar="LAMBDA", help=l2)
    add("--bounds", metavar="LOW,HIGH", help="keep every weight within these, such as 0,inf (default: no bounds)")
    add(
        "--against",
        action="append",
        metavar="EXPR",
        help="a fixed expression to compare with; may be repeated (default: that of --combine, the plain sum, the "
        "first model with half of each other, each model alone)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    from decode.fitting.hidden_states import hidden_states
    from decode.pipeline.journal import folder_digest
    from decode.pipeline.members import load_ensemble, open_members
    from decode.pipeline.output import check_writable
    from decode.pipeline.placement import listed, per_member, placements
    from decode.pipeline.report import finite, versions
    from minillama.machine import device_name

    language_name(arguments.source)
    language_name(arguments.target)
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    if not 0 <= arguments.l2 < float("inf"):
        raise InputError(f"--l2 {arguments.l2:g}: expected a number of 0 or more")
    files = [arguments.input, arguments.reference, *(arguments.held_out or ())]
    if files.count("-") > 1:
        raise InputError("standard input is given more than once; only one text can be read from it")
    if arguments.output == "-":
        raise InputError("--output -: give a file; standard output is for figures")
    if arguments.output:
        check_writable(arguments.output, files)
    folders = named_folders(arguments.model)
    names = list(folders)
    prior_N = _vector(combination(arguments, names), names)
    bounds = _bounds(arguments.bounds, len(names))
    against = _against(arguments.against, names, prior_N)
    places = placements(arguments.device, arguments.dtype, names, arguments.batch_size)
    prompts, chats = per_member(arguments.prompt, names, "--prompt"), per_member(arguments.chat, names, "--chat")
    members = open_members(folders, prompts, chats)
    pairs = read_pairs(arguments.input, arguments.reference, members, options)
    other_pairs = read_pairs(*arguments.held_out, members, options) if arguments.held_out else None
    device = listed({name: device_name(place.device) for name, place in places.items()})
    dtype = listed({name: place.weight_dtype for name, place in places.items()})
    sizes = ", ".join(f"{member.name} {member.checkpoint.parameters / 1e6:,.1f} M" for member in members)
    _log(
        f"weights of {len(names)} models ({sizes}): {pairs.summary} of {display_name(arguments.input)}, "
        f"{arguments.source} to {arguments.target}, {dtype}, {device}"
    )

    ensemble, seconds = load_ensemble(members, dict.fromkeys(names, 1.0), places)
    _log(f"loaded in {seconds:.1f} s")
    started = time.perf_counter()
    data = hidden_states(ensemble, pairs.prompts, pairs.targets, arguments.batch_size)
    data, end = data.with_end(prior_N)
    held_out = None
    if other_pairs is not None:
        held_out = hidden_states(
            ensemble, other_pairs.prompts, other_pairs.targets, arguments.batch_size, data.output
        ).with_end(prior_N)[0]
    del ensemble
    read_seconds = time.perf_counter() - started
    _log(f"{data.tokens:,} tokens with ends read in {read_seconds:.1f} s")

    started = time.perf_counter()
    scale, nats = best_scale(data, prior_N)
    _log(f"start: {format_sum(prior_N, names)} times {scale:.4g}")
    fit = fit_weights(data, scale * prior_N, prior_N, arguments.l2, bounds, _log)
    report = describe(fit, data, names)
    report["fit"] |= {
        "l2": arguments.l2,
        "bounds": [float(bounds.low_N[0]), float(bounds.high_N[0])] if arguments.bounds else None,
        "centre": format_sum(prior_N, names),
        "end_token": end,
        "seconds": round(time.perf_counter() - started, 3),
        "read_seconds": round(read_seconds, 3),
    }
    report["temperature"] = {"scale": scale, "temperature": 1 / scale if scale else float("inf"), "nats": nats}
    report["against"] = compare(fit, data, against, held_out)
    if held_out is not None:
        report["temperature"]["held_out_nats"] = float(held_out.nats(scale * prior_N).sum()) / held_out.tokens
        nats = float(held_out.nats(fit.weights_N).sum()) / held_out.tokens
        report["held_out"] = {"texts": held_out.texts, "tokens": held_out.tokens, "nats": nats}
    report |= {
        "models": folders,
        "digests": {member.name: folder_digest(member.folder) for member in members},
        "texts": {
            **{name: getattr(arguments, name) for name in ("input", "reference", "source", "target")},
            "blank": pairs.blank,
            "skipped_lines": pairs.skipped,
        },
        "prompts": {member.name: member.prompt.name for member in members},
        "chat": {member.name: member.chat.name for member in members},
        "device": device,
        "dtype": dtype,
        "versions": versions(),
    }
    if arguments.output:
        write_weights(arguments.output, report)
    print(json.dumps(finite(report), indent=2, ensure_ascii=False) if arguments.json else "\n".join(report_lines(report)))
    return 0


@dataclass
class Pairs:
    """Encoded pairs; how many lines were blank, and which lines (from 1) were too long."""

    prompts: list[tuple[list[int], ...]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    blank: int = 0
    skipped: list[int] = field(default_factory=list)

    @property
    def summary(self) -> str:
        parts = [f"{len(self.targets):,} pairs"]
        parts += [f"{self.blank:,} blank"] if self.blank else []
        parts += [f"{len(self.skipped):,} too long (line {self.skipped[0]}…)"] if self.skipped else []
        return ", ".join(parts)


def read_pairs(source: str, reference: str, members: Sequence[MemberSpec], options: Options) -> Pairs:
    """Raises InputError for files that are not line-aligned, and for those without a pair."""
    from decode.pipeline.members import encode_pair

    sentences, translations = read_lines(source), read_lines(reference)
    if len(sentences) != len(translations):
        raise not_aligned(display_name(source), len(sentences), display_name(reference), len(translations))
    pairs = Pairs()
    for line, (sentence, translation) in enumerate(zip(sentences, translations), 1):
        if is_blank(sentence, translation):
            pairs.blank += 1
            continue
        prompts, target = encode_pair(sentence, translation, members, options, f"{display_name(reference)}:{line}")
        if prompts is None:
            pairs.skipped.append(line)
        else:
            pairs.prompts.append(prompts)
            pairs.targets.append(target)
    if not pairs.targets:
        raise InputError(f"{display_name(source)}: no pairs to fit on, expected sentences with translations")
    return pairs


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


def _against(expressions: Sequence[str] | None, names: Sequence[str], prior_N: Array) -> dict[str, Array]:
    """Weights by expression."""
    first, *others = names
    if expressions is None:
        halves = [f"{first} + " + " + ".join(f"0.5*{name}" for name in others)] if others else []
        expressions = [format_sum(prior_N, names), " + ".join(names), *halves, *names]
    return {text: _vector(parse(text, names, all_used=False), names) for text in dict.fromkeys(expressions)}


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
