"""A made-up study for tests of reports: results.json as eval.paper writes it, and its texts. No figure is real."""

import json
import random
from pathlib import Path

from eval.study.expressions import EXPRESSIONS

JA = [
    "彼は走る。",
    "雨が降っている。",
    "シドニーのランドウィック競馬場で8頭の競走馬が馬インフルエンザに感染した。",
    "本を読む。",
]
EN = [
    "He runs.",
    "It is raining | hard <b>& cold</b>.",
    "It has been confirmed that eight thoroughbred race horses at Randwick Racecourse in Sydney have equine influenza.",
    "I read a book.",
]
SIDES = {"ja": JA, "en": EN, "de": ["Er läuft.", "Es regnet.", "Acht Pferde in Sydney haben Grippe.", "Ich lese."]}


def made_study(
    folder: Path, directions=("ja-en", "en-ja"), larges=("3B", "8B"), compare=True, texts=True, missing=()
) -> Path:
    """Writes results.json into `folder`; rows named in `missing` are left out."""
    generator = random.Random(1)
    data = {
        "title": "A made-up study",
        "config": "eval/made.toml",
        "config_sha256": "0" * 64,
        "date": "2026-11-24",
        "commit": "abc1234",
        "machine": "a machine, 2 cores, cpu",
        "versions": {"torch": "2.13.0"},
        "seconds": 2400.0,
        "settings": {
            "seed": 1,
            "compare_with_paper": compare,
            "system_header": None,
            "note": "100% of $x_1 & #2 {~^\\}",
        },
        "directions": {},
        "larges": list(larges),
        "small": "1B",
        "rows": [],
        "fits": {},
        "steps": [{"name": "sft ja-en S_mt", "seconds": 41.25, "key": "9f3c"}],
    }
    for direction in directions:
        source, target = direction.split("-")
        data["directions"][direction] = {
            "source": source,
            "target": target,
            "corpus": "made_up",
            "test": "4 lines",
            "sentences": 4,
            "dev": "other lines",
            "dev_sentences": 2,
            "source_file": _text(folder, direction, "source", SIDES[source], texts),
            "reference_file": _text(folder, direction, "reference", SIDES[target], texts),
        }
    for model in ("1B", *larges):
        rows = [("original", "Original", "L"), ("finetuning", "Fine-tuning", "L_MT")]
        if model != "1B":
            rows += [(suffix, expression.method, expression.combine) for suffix, expression in EXPRESSIONS.items()]
        rows += [("fitted", "fitted", "L + S_srcMT + S_tgtMT")] if model != "1B" else []
        for suffix, method, expression in rows:
            name = f"{model}.{suffix}"
            if name in missing:
                continue
            row = {"id": name, "large": model, "method": method, "expression": expression, "tables": [2, 4, 6]}
            row |= {"fitted": "likelihood" if suffix == "fitted" else None, "cells": {}}
            for direction in directions:
                row["cells"][direction] = _cell(folder, name, direction, generator, texts)
            data["rows"].append(row)
    fit = {
        "weights": {"L": 0.34, "S_srcMT": 0.31, "S_tgtMT": 0.43},
        "standard_errors": {"L": 0.011, "S_srcMT": 0.012, "S_tgtMT": 0.013},
        "nats_per_token": 2.183,
        "gradient_norm": 1.5e-9,
        "smallest_eigenvalue": 0.031,
        "fixed": {"L + S_srcMT + S_tgtMT": 3.891, "L + S_MT": 3.2},
    }
    for large in larges:
        data["fits"][large] = {
            direction: {"likelihood": fit, "all": fit | {"weights": {"L": 0.5}, "standard_errors": {}}}
            for direction in directions
        }
    path = folder / "results.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _cell(folder, name, direction, generator, texts):
    target = direction.split("-")[1]
    bleu = generator.uniform(5, 40)
    metrics = [{"key": "bleu", "label": "BLEU 13a", "score": bleu, "signature": "nrefs:1|tok:13a"}]
    if target == "ja":
        metrics.append(
            {"key": "bleu_ja_mecab", "label": "BLEU ja-mecab", "score": bleu + 9, "signature": "tok:ja-mecab"}
        )
    metrics.append({"key": "chrf", "label": "chrF2", "score": bleu + 20, "signature": "nrefs:1|nc:6"})
    metrics.append(
        {"key": "bertscore", "label": "BERTScore F1", "score": 0.9 + generator.random() / 20, "signature": "r_L17"}
    )
    p = {} if name.startswith("1B") else {"proxy": {"bleu": 0.001, "chrf": 0.2}, "large": {"bleu": 0.3, "chrf": 0.01}}
    lines = [" ".join(part for part in line.split() if generator.random() > 0.3) for line in SIDES[target]]
    weights = {"L": 0.34, "S_srcMT": 0.31, "S_tgtMT": 0.43} if name.endswith("fitted") else {"L": 1.0}
    return {
        "metrics": metrics,
        "p": p,
        "weights": weights,
        "nats_per_token": 2.5,
        "output_tokens": 7000,
        "seconds": 9.1,
        "tokens_per_second": 769.2,
        "peak_memory_bytes": 3 * 2**29,
        "hypothesis_file": _text(folder, direction, name, lines, texts),
    }


def _text(folder, direction, name, lines, texts):
    if not texts:
        return None
    path = folder / "texts" / direction / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path.relative_to(folder))
