"""`python -m decode.tune`: fit an ensemble's weights to translated text.

The weights that make the references of a development set likeliest, token by token. The negative log-likelihood is
convex in the weights (see teacher_forced.py), so Newton's method finds the one best set of them and proves it: the
gradient is zero and the Hessian positive. Each member reads every pair once; a step costs output layers alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corpora import language_name, read_lines
from corpora.pairs import is_blank
from corpora.text import display_name
from decode.ensemble import Ensemble
from decode.expression import parse, spell
from decode.fingerprint import folder_digest
from decode.fit import Bounds
from decode.members import Options, Reader, encode_pair, load_ensemble, open_readers
from decode.options import add_model_options, named_folders, not_aligned
from decode.output import check_writable
from decode.places import Place, listed, per_member, places
from decode.progress import DecodeProgress
from decode.report import device_name, versions
from decode.teacher_forced import Array, TeacherForced, teacher_forced
from decode.tune_report import curve_lines, fit_lines
from decode.tuning import best_scale, compare, describe, fit_weights, rounded, same_from_other_starts
from decode.weights_file import combination, write_toml
from minillama import InputError
from minillama.errors import exit_code

EXAMPLES = """examples:
  python -m decode.tune --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --source ja --target en \\
      --input dev.ja --reference dev.en --output weights.toml
  python -m decode.collab --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --weights weights.toml \\
      --source ja --target en --input src.txt --output hyp.txt

Fit on text that neither trained the models nor will test them; a few hundred pairs are enough (docs/tuning.md).
exit codes: 0 done, 2 bad arguments or input, 130 interrupted, 1 a fault
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m decode.tune",
        description="Fit the weights of a sum of logits to translated text, by likelihood.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    add("--starts", type=int, default=0, metavar="N", help="fit again from N random starts and say how far they end")
    add("--seed", type=int, default=0, metavar="N", help="of the random starts (default 0)")
    add("--curve", metavar="N,N,…", help="also fit on the first N pairs: what more text would bring")
    return result


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs in the order of their lines; how many lines were blank and which (from 1) were too long."""

    prompts: list[tuple[list[int], ...]]
    targets: list[list[int]]
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


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


def prepare(arguments: argparse.Namespace) -> Job:
    """Everything cheap, and everything that can be refused."""
    language_name(arguments.source), language_name(arguments.target)
    for name in ("batch_size", "starts", "seed"):
        least = int(name == "batch_size")
        if getattr(arguments, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")
    if not 0 <= arguments.l2 < float("inf"):
        raise InputError(f"--l2 {arguments.l2:g}: expected a number of 0 or more")
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
    found = Pairs([], [], sum(map(is_blank, sentences, translations)), [])
    for line, (sentence, translation) in enumerate(zip(sentences, translations), 1):
        if is_blank(sentence, translation):
            continue
        prompts, target = encode_pair(sentence, translation, readers, options, f"{display_name(reference)}:{line}")
        if prompts is None:
            found.skipped.append(line)
            continue
        found.prompts.append(prompts)
        found.targets.append(target)
    if not found.targets:
        raise InputError(f"{display_name(source)}: no pairs to fit on, expected sentences with translations")
    return found


def run(arguments: argparse.Namespace) -> int:
    job = prepare(arguments)
    sizes = ", ".join(f"{reader.name} {reader.checkpoint.parameters / 1e6:,.1f} M" for reader in job.readers)
    where = listed({name: f"{place.storage}, {device_name(place.device)}" for name, place in job.places.items()})
    _tell(
        f"weights of {len(job.names)} models ({sizes}): {job.pairs.describe()} of {display_name(arguments.input)}, "
        f"{arguments.source} to {arguments.target}, {where}"
    )
    ensemble, seconds = load_ensemble(job.readers, dict.fromkeys(job.names, 1.0), job.places)
    _tell(f"loaded in {seconds:.1f} s")
    started = time.perf_counter()
    data, end = states(job.pairs, ensemble, arguments.batch_size).with_end(job.centre_N)
    held_out = None
    if job.held_out is not None:
        held_out, _ = states(job.held_out, ensemble, arguments.batch_size).with_end(job.centre_N)
    del ensemble
    read_seconds = time.perf_counter() - started
    _tell(f"{data.tokens:,} tokens with ends read in {read_seconds:.1f} s")
    started = time.perf_counter()
    scale, nats = best_scale(data, job.centre_N)
    _tell(f"{spell_weights(job.centre_N, job.names)} is best times {scale:.4g}: from there")
    fit = fit_weights(data, scale * job.centre_N, job.centre_N, arguments.l2, job.bounds, _tell)
    report = describe(fit, data, job.names)
    report["fit"] |= {
        "l2": arguments.l2,
        "bounds": [float(job.bounds.low_N[0]), float(job.bounds.high_N[0])] if arguments.bounds else None,
        "centre": spell_weights(job.centre_N, job.names),
        "end_token": end,
        "seconds": round(time.perf_counter() - started, 3),
        "read_seconds": round(read_seconds, 3),
    }
    report["temperature"] = {"scale": scale, "temperature": 1 / scale if scale else float("inf"), "nats": nats}
    report["against"] = compare(fit, data, job.against, held_out)
    if held_out is not None:
        report["temperature"]["held_out_nats"] = float(held_out.nats(scale * job.centre_N).sum()) / held_out.tokens
        report["held_out"] = {
            "texts": held_out.texts,
            "tokens": held_out.tokens,
            "nats": float(held_out.nats(fit.weights_N).sum()) / held_out.tokens,
        }
    if arguments.starts:
        report["starts"] = same_from_other_starts(
            fit, data, job.centre_N, arguments.l2, job.bounds, arguments.starts, arguments.seed
        )
    if job.curve:
        report["curve"] = curve(job, data, held_out)
    report |= _origin(job)
    if arguments.output:
        write_toml(arguments.output, "Written by decode.tune; decode.collab --weights reads it.", _for_file(report))
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(fit_lines(report) + curve_lines(report)))
    return 0


def states(pairs: Pairs, ensemble: Ensemble, batch_size: int) -> TeacherForced:
    progress = DecodeProgress(len(pairs.targets))
    try:
        return teacher_forced(ensemble, pairs.prompts, pairs.targets, batch_size, progress)
    finally:
        progress.stop()


def curve(job: Job, data: TeacherForced, held_out: TeacherForced | None) -> list[dict[str, Any]]:
    """Fits on the first pairs alone, judged by the held-out text or by the pairs that the largest of them leaves."""
    judge = held_out or data.after(max(job.curve))
    rows = []
    for count in job.curve:
        part = data.first(count)
        fit = fit_weights(part, job.centre_N, job.centre_N, job.arguments.l2, job.bounds)
        rows.append(
            {
                "texts": count,
                "tokens": part.tokens,
                "weights": dict(zip(job.names, map(float, fit.weights_N))),
                "nats": fit.minimum.function.value,
                "held_out_texts": judge.texts,
                "held_out_nats": float(judge.nats(fit.weights_N).sum()) / judge.tokens,
                "held_out_start_nats": float(judge.nats(job.centre_N).sum()) / judge.tokens,
            }
        )
    return rows


def spell_weights(weights_N: Array, names: Sequence[str]) -> str:
    return spell({name: float(weight) for name, weight in zip(names, weights_N) if weight})


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


def _origin(job: Job) -> dict[str, Any]:
    arguments, digests = job.arguments, {reader.name: folder_digest(reader.folder) for reader in job.readers}
    return {
        "models": job.folders,
        "digests": digests,
        "texts": {
            "input": arguments.input,
            "reference": arguments.reference,
            "source": arguments.source,
            "target": arguments.target,
            "blank": job.pairs.blank,
            "skipped_lines": job.pairs.skipped,
        },
        "prompts": {reader.name: reader.prompt.name for reader in job.readers},
        "chat": {reader.name: reader.chat.name for reader in job.readers},
        "device": listed({name: device_name(place.device) for name, place in job.places.items()}),
        "dtype": listed({name: place.storage for name, place in job.places.items()}),
        "versions": versions(),
    }


def _for_file(report: dict[str, Any]) -> dict[str, Any]:
    """The report as TOML has it: two levels, the likelihoods of fixed expressions as a table."""
    found = {key: value for key, value in report.items() if key not in ("against", "curve")}
    return found | {"against": {row["expression"]: row["nats"] for row in report["against"]}}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
