"""`python -m decode.tune`: fit an ensemble's weights to translated text.

The weights that make the references of a development set likeliest, token by token. The negative log-likelihood is
convex in the weights (see teacher_forced.py), so Newton's method finds the one best set of them and proves it: the
gradient is zero and the Hessian positive. Each member reads every pair once; a step costs output layers alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corpora.text import display_name
from decode.bleu_fit import Task, fit_bleu
from decode.pipeline.fingerprint import folder_digest
from decode.pipeline.members import load_ensemble
from decode.pipeline.placement import listed
from decode.model.packed_llama import PreparedLlama
from decode.pipeline.report import device_name, finite, versions
from decode.fitting.hidden_states import TeacherForced, teacher_forced
from decode.tune_options import BEAMS, LONGEST, ROUNDS, Job, parser, prepare
from decode.fitting.report import curve_lines, fit_lines
from decode.fitting.fit import best_scale, compare, describe, fit_weights, same_from_other_starts, spell_weights
from decode.pipeline.weights_file import write_toml
from minillama.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


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
    pairs, size = job.pairs, arguments.batch_size
    data, end = teacher_forced(ensemble, pairs.prompts, pairs.targets, size).with_end(job.centre_N)
    held_out = None
    if job.held_out is not None:
        pairs = job.held_out
        held_out, _ = teacher_forced(ensemble, pairs.prompts, pairs.targets, size, data.output).with_end(job.centre_N)
    models = {member.name: member.model for member in ensemble.members} if arguments.objective == "bleu" else {}
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
    if models:
        report = bleu_report(job, report, models, data, held_out)
    report |= _origin(job)
    if arguments.output:
        write_toml(arguments.output, "Written by decode.tune; decode.collab --weights reads it.", _for_file(report))
    if arguments.json:
        print(json.dumps(finite(report), indent=2, ensure_ascii=False))
    else:
        print("\n".join(fit_lines(report) + curve_lines(report)))
    return 0


def bleu_report(
    job: Job,
    likelihood: Mapping[str, Any],
    models: Mapping[str, PreparedLlama],
    data: TeacherForced,
    held_out: TeacherForced | None,
) -> dict[str, Any]:
    """The report with weights fitted to BLEU; the likeliest, their errors and certificate stay under other names."""
    started, arguments = time.perf_counter(), job.arguments
    task = Task(
        models,
        job.readers[0].tokenizer,
        job.pairs.prompts,
        job.pairs.references,
        arguments.target,
        arguments.beam or BEAMS,
        arguments.max_new_tokens or LONGEST,
        arguments.batch_size,
    )
    rounds = ROUNDS if arguments.rounds is None else arguments.rounds
    likeliest_N = np.array([likelihood["weights"][name] for name in job.names])
    weights_N, bleu = fit_bleu(task, data, likeliest_N, job.centre_N, rounds, arguments.seed, _tell)
    kept = {key: likelihood["fit"][key] for key in ("texts", "tokens", "centre", "end_token")}
    report = {
        **likelihood,
        "objective": "bleu",
        "combine": spell_weights(weights_N, job.names),
        "weights": dict(zip(job.names, map(float, weights_N))),
        "fit": kept | {"nats": float(data.nats(weights_N).sum()) / data.tokens},
        "bleu": bleu | {"seconds": round(time.perf_counter() - started, 3)},
        "likeliest": likelihood["weights"],
        "likeliest_errors": likelihood["standard_errors"],
        "likelihood": likelihood["fit"],
    }
    del report["standard_errors"]
    if held_out is not None:
        nats = float(held_out.nats(weights_N).sum()) / held_out.tokens
        report["held_out"] = {**likelihood["held_out"], "nats": nats, "likeliest_nats": likelihood["held_out"]["nats"]}
    return report


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
    if "bleu" in found:
        found["bleu"] = {key: value for key, value in found["bleu"].items() if key != "rounds"}
    return found | {"against": {row["expression"]: row["nats"] for row in report["against"]}}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
