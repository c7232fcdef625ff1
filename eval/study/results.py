"""`results.json` of a study, gathered from the folders of its steps: scores, fits, speed, memory.

Translations and texts stay in the steps' folders; results.json has their paths.
"""

import json
import os
import subprocess
import time
import tomllib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from decode.engine.expression import format_weights
from eval.study.expressions import EXPRESSIONS, FITTED
from eval.study.graph import Step, Store, in_order
from eval.study.steps import Steps, StudyRow
from minillama.machine import device_name, pick_device, processor_name, versions

PACKAGES = ("torch", "collab-mt", "safetensors", "tokenizers", "sacrebleu", "triton")
AGAINST = {"proxy": "proxy", "original": "large"}  # keys of p-values, by the part of a row's name after the dot


def gather(steps: Steps, store: Store, config: Path) -> dict[str, Any]:
    """The contents of results.json. Every step must be done. Paths of texts are relative to `store.work`."""
    study = steps.study
    fits = _fits(steps, store)
    steps_done = [_step(step, store) for step in in_order(steps.targets())]
    return {
        "title": study.title,
        "config": config.name if config.is_absolute() else str(config),
        "config_sha256": sha256(config.read_bytes()).hexdigest(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {device_name(pick_device('auto'))}",
        "versions": versions(*PACKAGES),
        "seconds": round(sum(step["seconds"] for step in steps_done), 1),
        "settings": _settings(steps),
        "directions": {direction: _direction(steps, store, direction) for direction in study.directions()},
        "small": study.small,
        "larges": study.larges,
        "rows": [_row(row, steps, store, fits) for row in steps.rows],
        "fits": fits,
        "steps": steps_done,
    }


def _step(step: Step, store: Store) -> dict[str, Any]:
    done = store.done(step)
    return {"name": step.name, "key": step.key[:16]} | {key: done[key] for key in ("seconds", "peak_memory_bytes")}


def _row(row: StudyRow, steps: Steps, store: Store, fits: dict[str, Any]) -> dict[str, Any]:
    first_large = row.large in (steps.study.small, *steps.study.larges[:1])
    return {
        "id": row.id,
        "large": row.large,
        "method": row.expression.method,
        "expression": row.expression.combine,
        "tables": [number for number in row.expression.tables if first_large or number in (2, 6)],
        "fitted": row.fitted,
        "cells": {direction: _cell(row, direction, steps, store, fits) for direction in row.decode},
    }


def _cell(row: StudyRow, direction: str, steps: Steps, store: Store, fits: dict[str, Any]) -> dict[str, Any]:
    step = row.decode[direction]
    scores = json.loads((store.folder(steps.scores[direction, row.large]) / "scores.json").read_text("utf-8"))
    system = scores["systems"][row.id]
    run = json.loads((store.folder(step) / "run.json").read_text("utf-8"))
    return {
        "metrics": system["metrics"],
        "p": {AGAINST[name.rpartition(".")[2]]: values for name, values in system["p"].items()},
        "weights": run["weights"],
        "nats_per_token": _nats_per_token(row, fits.get(row.large, {}).get(direction, {})),
        "output_tokens": run["output_tokens"],
        "seconds": run["seconds"],
        "tokens_per_second": run["tokens_per_second"],
        "peak_memory_bytes": store.done(step)["peak_memory_bytes"],
        "hypothesis_file": str(_relative(store, step, "hyp.txt")),
    }


def _nats_per_token(row: StudyRow, fits: dict[str, Any]) -> float | None:
    """NLL per token on the dev text, if a fit of this large model and direction computed it."""
    for kind, fit in fits.items():
        if row.fitted and row.id == f"{row.large}.{FITTED[kind][0]}":
            return fit.get("nats_per_token")
        if not row.fitted and not row.id.endswith(".finetuning") and row.expression.combine in fit["fixed"]:
            return float(fit["fixed"][row.expression.combine])
    return None


def _fits(steps: Steps, store: Store) -> dict[str, Any]:
    """By large model, direction and kind: what `decode.tune` wrote."""
    found: dict[str, Any] = {}
    for (direction, large, kind), step in steps.fits.items():
        written = tomllib.loads((store.folder(step) / "weights.toml").read_text("utf-8"))
        entry = {"weights": written["weights"], "standard_errors": written.get("standard_errors", {})}
        entry |= {key: value for key, value in written.get("fit", {}).items() if not key.endswith("seconds")}
        entry["nats_per_token"] = entry.pop("nats", None)
        entry["fixed"] = _fixed(written.get("against", {}))
        found.setdefault(large, {}).setdefault(direction, {})[kind] = entry
    return found


def _fixed(against: dict[str, float]) -> dict[str, float]:
    """NLL per token by expression, each written as the paper's tables have it."""
    known = {format_weights(expression.weights): expression.combine for expression in EXPRESSIONS.values()}
    return {known.get(expression, expression): nats for expression, nats in against.items()}


def _direction(steps: Steps, store: Store, direction: str) -> dict[str, Any]:
    source, target = direction.split("-")
    corpus = steps.study.directions()[direction]
    found: dict[str, Any] = {"source": source, "target": target, "corpus": corpus}
    parts = steps.study.corpora[corpus].parts()
    for part, count in (("test", "sentences"), ("dev", "dev_sentences")):
        if (text := parts.get(part)) is None:
            continue
        lines = f", lines {text.lines[0]:,} to {text.lines[1]:,}" if text.lines else ""
        found[part] = (text.split or text.files) + lines
        folder = store.folder(steps.part(corpus, part)) / "out"
        found[count] = len((folder / f"{source}.txt").read_text("utf-8").splitlines())
    for name, language in (("source_file", source), ("reference_file", target)):
        found[name] = str(_relative(store, steps.part(corpus, "test"), f"out/{language}.txt"))
    return found


def _settings(steps: Steps) -> dict[str, Any]:
    """The study's settings as one flat table of `table.key`."""
    study = steps.study
    found: dict[str, Any] = {"compare_with_paper": study.compare_with_paper, "seed": study.seed, **study.notes}
    for table in ("train", "decode", "fit", "score"):
        for key, value in asdict(getattr(study, table)).items():
            if isinstance(value, dict):
                found |= {f"{table}.{key}.{inner}": entry for inner, entry in value.items()}
            else:
                found[f"{table}.{key}"] = value
    return found


def _relative(store: Store, step: Step, name: str) -> Path:
    return (store.folder(step) / name).relative_to(store.work)


def _commit() -> str | None:
    """The commit of this checkout, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
