"""`run.json`: what was run, what came out, how fast, and in which environment."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from corpora.metrics import text_metrics
from decode.pipeline.members import Options, Reader
from decode.pipeline.placement import Place, listed
from decode.pipeline.results import Results
from decode.pipeline.session import TooLong
from decode.pipeline.work import Done
from minillama import InputError
from minillama.files import atomic_write


def describe_run(
    results: Results,
    done: Done,
    lines: int,
    options: Options,
    readers: Sequence[Reader],
    places: Mapping[str, Place],
    too_long: Mapping[str, TooLong],
) -> dict[str, Any]:
    """Counts of the whole output; seconds, steps and speeds of this run alone, which may have resumed another."""
    seconds = max(done.seconds, 1e-9)
    report = {
        "sentences": lines,
        "output_tokens": results.tokens,
        "seconds": round(done.seconds, 4),
        "tokens_per_second": round((results.tokens - results.resumed_tokens) / seconds, 2),
        "sentences_per_second": round((lines - results.resumed) / seconds, 2),
        "steps": done.steps,
        "first_token_seconds": None if done.first_token_seconds is None else round(done.first_token_seconds, 4),
        "resumed_sentences": results.resumed,
        "prompts": {reader.name: reader.prompt.name for reader in readers},
        "chat": {reader.name: reader.chat.name for reader in readers},
        **asdict(options),
        "device": listed({name: device_name(place.device) for name, place in places.items()}),
        "dtype": listed({name: place.storage for name, place in places.items()}),
        "versions": versions(),
    }
    for kind, found in too_long.items():
        report[f"{kind}_lines"] = found.lines
        if found.count > len(found.lines):
            report[f"{kind}_count"] = found.count
    return report


def scores(hypotheses: Sequence[str], references: Sequence[str], target: str) -> dict[str, Any]:
    """BLEU under 13a and the target language's own tokenizer, and chrF: each score and its signature."""
    found: dict[str, Any] = {}
    for metric in text_metrics(["bleu", "chrf"], references, target):
        found[metric.key] = metric.metric.corpus_score(list(hypotheses), None).score
        found[f"{metric.key}_signature"] = metric.metric.get_signature().format()
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("collab-mt", "safetensors", "tokenizers", "sacrebleu", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''})"


def summary(report: Mapping[str, Any]) -> list[str]:
    """The lines that a user reads at the end."""
    found = [
        f"{kind}, too long for a context: line {', '.join(map(str, lines))}"
        + (f" and {report[f'{kind}_count'] - len(lines):,} more" if f"{kind}_count" in report else "")
        for kind in ("skipped", "truncated")
        if (lines := report[f"{kind}_lines"])
    ]
    resumed = f" ({report['resumed_sentences']:,} by an earlier run)" if report["resumed_sentences"] else ""
    first = report["first_token_seconds"]
    found.append(
        f"{report['sentences']:,} sentences{resumed}, {report['output_tokens']:,} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['sentences_per_second']:,.1f} sentences/s"
        + ("" if first is None else f"; first token after {first:.2f} s")
    )
    found += [
        f"{key} {report[key]:.2f}  {report[f'{key}_signature']}" for key in report if f"{key}_signature" in report
    ]
    return found


def write_report(path: str, report: Mapping[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    try:
        atomic_write(Path(path), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
