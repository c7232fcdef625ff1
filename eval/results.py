"""`results.json` of a study, gathered from what its steps left: scores, fits, speed, memory; texts stay in place."""

import json
import os
import subprocess
import time
import tomllib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from decode.pipeline.report import device_name, versions
from eval.expressions import EXPRESSIONS, FITTED, tables
from eval.graph import Step, Store, in_order
from eval.steps import Row, Steps
from minillama.machine import pick_device


def gather(steps: Steps, store: Store, config: Path, seconds: float) -> dict[str, Any]:
    """Of a study whose steps are done. Paths of texts are relative to `store.work`.

    seconds: how long the whole took, as it ran.
    """
    study = steps.study
    every = in_order(steps.wanted())
    fits = _fits(steps, store)
    return {
        "title": study.title,
        "config": config.name if config.is_absolute() else str(config),
        "config_sha256": sha256(config.read_bytes()).hexdigest(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {device_name(pick_device('auto'))}",
        "versions": versions(),
        "seconds": round(seconds, 1),
        "settings": _settings(steps),
        "directions": {direction: _direction(steps, store, direction) for direction in study.directions()},
        "small": study.small,
        "larges": study.larges,
        "rows": [_row(row, steps, store, fits) for row in steps.rows],
        "fits": fits,
        "steps": [
            {"name": step.name, "seconds": (done := store.done(step))["seconds"], "key": step.key[:16]}
            | {"peak_memory_bytes": done["peak_memory_bytes"]}
            for step in every
        ],
    }


def _row(row: Row, steps: Steps, store: Store, fits: dict[str, Any]) -> dict[str, Any]:
    first_large = row.large in (steps.study.small, steps.study.larges[0])
    return {
        "id": row.id,
        "large": row.large,
        "method": row.expression.method,
        "expression": row.expression.combine,
        "tables": tables(row.expression, first_large),
        "fitted": row.fitted,
        "cells": {direction: _cell(row, direction, step, steps, store, fits) for direction, step in row.decode.items()},
    }


def _cell(row: Row, direction: str, step: Step, steps: Steps, store: Store, fits: dict[str, Any]) -> dict[str, Any]:
    scored = json.loads((store.folder(steps.scores[direction, row.large]) / "scores.json").read_text("utf-8"))
    system = scored["systems"][row.id]
    run = json.loads((store.folder(step) / "run.json").read_text("utf-8"))
    names = {f"{row.large}.proxy": "proxy", f"{row.large}.original": "large"}
    return {
        "metrics": system["metrics"],
        "p": {names[name]: values for name, values in system["p"].items()},
        "weights": run["weights"],
        "nats_per_token": _nats(row, direction, steps, fits),
        "output_tokens": run["output_tokens"],
        "seconds": run["seconds"],
        "tokens_per_second": run["tokens_per_second"],
        "peak_memory_bytes": store.done(step)["peak_memory_bytes"],
        "hypothesis_file": str(_relative(store, step, "hyp.txt")),
    }


def _nats(row: Row, direction: str, steps: Steps, fits: dict[str, Any]) -> float | None:
    """Nats a token on the dev text, where a fit of this large model measured them."""
    of_large = fits.get(row.large, {}).get(direction, {})
    for kind, fit in of_large.items():
        if row.fitted and row.id == f"{row.large}.{FITTED[kind][0]}":
            return fit.get("nats_per_token")
        if not row.fitted and row.id.partition(".")[2] != "finetuning":
            found = fit.get("fixed", {}).get(row.expression.combine)
            if found is not None:
                return float(found)
    return None


def _fits(steps: Steps, store: Store) -> dict[str, Any]:
    """For each large model and direction what `decode.tune` wrote, in the report's names."""
    found: dict[str, Any] = {}
    for (direction, large, kind), step in steps.fits.items():
        written = tomllib.loads((store.folder(step) / "weights.toml").read_text("utf-8"))
        entry = {"weights": written["weights"], "standard_errors": written.get("standard_errors", {})}
        entry |= {key: value for key, value in written.get("fit", {}).items() if not key.endswith("seconds")}
        entry["nats_per_token"] = entry.pop("nats", None)
        entry["fixed"] = _fixed(written.get("against", {}))
        found.setdefault(large, {}).setdefault(direction, {})[kind] = entry
    return found


def _fixed(against: dict[str, Any]) -> dict[str, float]:
    """Nats a token by expression, spelled as the tables spell it."""
    from decode.engine.expression import parse, spell

    names = ["L", "S_all", "S_MT", "S_srcMT", "S_tgtMT"]
    known = {spell(parse(e.combine, [n for n in names if n in e.combine])): e.combine for e in EXPRESSIONS.values()}
    return {known.get(expression, expression): nats for expression, nats in against.items()}


def _direction(steps: Steps, store: Store, direction: str) -> dict[str, Any]:
    source, target = direction.split("-")
    corpus = steps.study.directions()[direction]
    found: dict[str, Any] = {"source": source, "target": target, "corpus": corpus}
    for part, count in (("test", "sentences"), ("dev", "dev_sentences")):
        if (text := steps.study.corpora[corpus].parts().get(part)) is None:
            continue
        lines = f", lines {text.lines[0]:,} to {text.lines[1]:,}" if text.lines else ""
        found[part] = (text.split or text.files) + lines
        folder = store.folder(steps.part(corpus, part)) / "out"
        found[count] = len((folder / f"{source}.txt").read_text("utf-8").splitlines())
    for name, language in (("source_file", source), ("reference_file", target)):
        found[name] = str(_relative(store, steps.part(corpus, "test"), f"out/{language}.txt"))
    return found


def _settings(steps: Steps) -> dict[str, Any]:
    """The study's settings, flat: what a reader may want to know or change."""
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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def _commit() -> str | None:
    """The checkout's commit, None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        words = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
