"""`run.json`: what was run, what came out, how fast, and in which environment."""

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from corpora.metrics import text_metrics
from minillama import InputError
from minillama.files import write_whole


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
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_report(path: str, report: dict[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    try:
        write_whole(Path(path), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
