"""A run of `decode.tune`: pairs are read, hidden states computed, weights fitted, and a report written.

The negative log-likelihood of the references is convex in the weights (fitting/hidden_states.py), so Newton's method
finds the minimum and proves it: the gradient is zero and the Hessian positive definite. Each member reads every pair
once; a step costs output layers alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from corpora import read_lines
from corpora.pairs import is_blank
from corpora.text import display_name
from decode.engine.expression import parse
from decode.fitting.fit import best_scale, compare, describe_fit, fit_weights, format_sum, report_lines, rounded
from decode.fitting.hidden_states import hidden_states
from decode.fitting.newton import Array, Bounds
from decode.pipeline.config import Options, named_folders
from decode.pipeline.journal import folder_digest
from decode.pipeline.members import EnsembleSpec, MemberSpec, encode_pair
from decode.pipeline.output import check_writable
from decode.pipeline.placement import listed
from decode.pipeline.report import finite, versions
from decode.pipeline.weights_file import combination, write_weights
from minillama.errors import InputError
from minillama.machine import device_name


@dataclass
class Pairs:
    """Encoded pairs; how many lines were blank, and which lines (from 1) were too long."""

    prompts: list[tuple[list[int], ...]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    blank: int = 0
    skipped: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        blank = f", {self.blank:,} blank" if self.blank else ""
        skipped = f", {len(self.skipped):,} too long (line {self.skipped[0]}…)" if self.skipped else ""
        return f"{len(self.targets):,} pairs{blank}{skipped}"


def run(arguments: argparse.Namespace) -> int:
    """The whole command after its options are parsed; what can be refused is refused before weights are loaded."""
    options = Options(arguments.source, arguments.target, batch_size=arguments.batch_size, too_long=arguments.too_long)
    if not 0 <= arguments.l2 < float("inf"):
        raise InputError(f"--l2 {arguments.l2:g}: expected a number of 0 or more")
    texts = [(arguments.input, arguments.reference), *([arguments.held_out] if arguments.held_out else [])]
    files = [file for pair in texts for file in pair]
    if files.count("-") > 1:
        raise InputError("standard input is given more than once; only one text can be read from it")
    if arguments.output == "-":
        raise InputError("--output -: give a file; standard output is for figures")
    if arguments.output:
        check_writable(arguments.output, files)
    folders = named_folders(arguments.model)
    names = list(folders)
    prior_N = _vector(combination(arguments, names), names)
    bounds, against = _bounds(arguments.bounds), _against(arguments.against, names, prior_N)
    models = EnsembleSpec.from_arguments(arguments, options.batch_size, weights=dict.fromkeys(names, 1.0))
    members, where = models.members, models.placements
    pairs, *others = [read_pairs(source, reference, members, options) for source, reference in texts]
    sum_of_models, devices = models.describe()
    read = f"{pairs} of {display_name(arguments.input)}, {options.source} to {options.target}"
    _log(f"weights of {sum_of_models}: {read}, {devices}")

    ensemble, seconds = models.load()
    _log(f"loaded in {seconds:.1f} s")
    started = time.perf_counter()
    data, end = hidden_states(ensemble, pairs.prompts, pairs.targets, options.batch_size).with_end(prior_N)
    held_out = None
    for other in others:
        states = hidden_states(ensemble, other.prompts, other.targets, options.batch_size, data.output)
        held_out, _ = states.with_end(prior_N)
    del ensemble
    read_seconds = time.perf_counter() - started
    _log(f"{data.tokens:,} tokens with ends read in {read_seconds:.1f} s")

    started = time.perf_counter()
    scale, nats = best_scale(data, prior_N)
    _log(f"start: {format_sum(prior_N, names)} times {scale:.4g}")
    fit = fit_weights(data, scale * prior_N, prior_N, arguments.l2, bounds, _log)
    report = describe_fit(fit, data, names)
    report["fit"] |= {
        "l2": arguments.l2,
        "bounds": [bounds.low, bounds.high] if arguments.bounds else None,
        "centre": format_sum(prior_N, names),
        "end_token": end,
        "seconds": round(time.perf_counter() - started, 3),
        "read_seconds": round(read_seconds, 3),
    }
    report["temperature"] = {"scale": scale, "temperature": 1 / scale if scale else float("inf"), "nats": nats}
    report["against"] = compare(fit, data, against, held_out)
    if held_out is not None:
        report["temperature"]["held_out_nats"] = held_out.mean_nats(scale * prior_N)
        nats = held_out.mean_nats(fit.weights_N)
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
        "device": listed({name: device_name(placement.device) for name, placement in where.items()}),
        "dtype": listed({name: placement.weight_dtype for name, placement in where.items()}),
        "versions": versions(),
    }
    if arguments.output:
        write_weights(arguments.output, report)
    as_json = json.dumps(finite(report), indent=2, ensure_ascii=False)
    print(as_json if arguments.json else "\n".join(report_lines(report)))
    return 0


def read_pairs(source: str, reference: str, members: Sequence[MemberSpec], options: Options) -> Pairs:
    """Raises InputError for files that are not line-aligned, and for those without a pair."""
    names = display_name(source), display_name(reference)
    sentences, translations = read_lines(source), read_lines(reference)
    if len(sentences) != len(translations):
        counts = f"{names[0]} has {len(sentences):,} lines, {names[1]} has {len(translations):,}"
        raise InputError(f"{counts}; they must be line-aligned")
    pairs = Pairs()
    for line, (sentence, translation) in enumerate(zip(sentences, translations), 1):
        if is_blank(sentence, translation):
            pairs.blank += 1
            continue
        prompts, target = encode_pair(sentence, translation, members, options, f"{names[1]}:{line}")
        if prompts is None:
            pairs.skipped.append(line)
        else:
            pairs.prompts.append(prompts)
            pairs.targets.append(target)
    if not pairs.targets:
        raise InputError(f"{names[0]}: no pairs to fit on, expected sentences with translations")
    return pairs


def _vector(weights: dict[str, float], names: Sequence[str]) -> Array:
    return np.array([weights.get(name, 0.0) for name in names])


def _bounds(text: str | None) -> Bounds:
    try:
        low, high = (rounded(float(part)) for part in (text or "-inf,inf").split(","))
    except ValueError:
        raise InputError(f"--bounds {text}: expected LOW,HIGH, such as 0,1 or -0.5,inf") from None
    if not low <= high or low == float("inf") or high == -float("inf"):
        raise InputError(f"--bounds {text}: expected two numbers, the first not above the second")
    return Bounds(low, high)


def _against(expressions: Sequence[str] | None, names: Sequence[str], prior_N: Array) -> dict[str, Array]:
    """Weights by expression."""
    if expressions is None:
        halves = " + 0.5*".join(names)
        expressions = [format_sum(prior_N, names), " + ".join(names), halves, *names]
    return {text: _vector(parse(text, names, all_used=False), names) for text in dict.fromkeys(expressions)}


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
