"""What a run of decode.collab reports: its plan, its end, and `run.json`: counts, speed, scores, environment."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.metrics import text_metrics
from decode.engine.expression import format_weights
from decode.pipeline.placement import listed
from minillama import machine
from minillama.errors import InputError
from minillama.files import atomic_write

if TYPE_CHECKING:
    from decode.pipeline.input import EncodedLine
    from decode.pipeline.run import TranslationRun

# Too long lines whose numbers are listed in the report; beyond that they are only counted.
LISTED = 1000


@dataclass
class RunStats:
    """What a run did.

    seconds: decoding alone, the longest of all processes.   steps: the sum of all processes.   first_token_seconds: the
    earliest, since `started` (time.perf_counter()).   too_long: numbers, from 1, of the lines.
    """

    started: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    first_token_seconds: float | None = None
    lines: int = 0
    too_long: dict[str, list[int]] = field(default_factory=lambda: {"skipped": [], "truncated": []})

    def add_input(self, lines: "Sequence[EncodedLine]") -> None:
        self.lines += len(lines)
        for line in lines:
            if line.too_long:
                self.too_long[line.too_long].append(line.number + 1)

    def shared(self) -> dict[str, Any]:
        """What `merge` needs from another process."""
        return {name: getattr(self, name) for name in ("seconds", "steps", "first_token_seconds")}

    def merge(self, seconds: float, steps: int, first_token_seconds: float | None) -> None:
        """Add the work of another process."""
        self.seconds = max(self.seconds, seconds)
        self.steps += steps
        both = [value for value in (self.first_token_seconds, first_token_seconds) if value is not None]
        self.first_token_seconds = min(both, default=None)


def describe_plan(run: "TranslationRun") -> str:
    """What the run will do, before the long part of it."""
    options, distributed, file = run.options, run.distributed, run.file
    models, where = run.models.describe()
    groups = f" in groups of {distributed.tp_size}" if distributed.tp_size > 1 else ""
    is_resumable = file is None or run.journal is not None or run.arguments.output == "-"
    pieces = [
        f"{models}: {'standard input' if file is None else f'{len(file):,} sentences of {run.arguments.input}'}",
        f"{len(run.done):,} of them finished by an earlier run" if run.done else "",
        f"{options.source} to {options.target}, batches of {options.batch_size}",
        run.memory,
        where,
        f"{distributed.processes} processes{groups}" if distributed.processes > 1 else "",
        "" if is_resumable else "no journal: this run cannot be resumed",
    ]
    return ", ".join(filter(None, pieces))


def describe_run(run: "TranslationRun") -> dict[str, Any]:
    """`run.json`: counts of the whole output; seconds, steps and speeds of this run, which may have resumed another."""
    assert run.outputs is not None
    stats, outputs, models = run.stats, run.outputs, run.models
    seconds, first = max(stats.seconds, 1e-9), stats.first_token_seconds
    report: dict[str, Any] = {
        "sentences": stats.lines,
        "output_tokens": outputs.tokens,
        "seconds": round(stats.seconds, 4),
        "tokens_per_second": round((outputs.tokens - outputs.resumed_tokens) / seconds, 2),
        "sentences_per_second": round((stats.lines - outputs.resumed) / seconds, 2),
        "steps": stats.steps,
        "first_token_seconds": None if first is None else round(first, 4),
        "resumed_sentences": outputs.resumed,
        "prompts": {member.name: member.prompt.name for member in models.members},
        "chat": {member.name: member.chat.name for member in models.members},
        **asdict(run.options),
        "device": listed({name: machine.device_name(p.device) for name, p in models.placements.items()}),
        "dtype": listed({name: p.weight_dtype for name, p in models.placements.items()}),
        "versions": versions(),
        **{f"{kind}_lines": lines[:LISTED] for kind, lines in stats.too_long.items()},
        **{f"{kind}_count": len(lines) for kind, lines in stats.too_long.items() if len(lines) > LISTED},
        "load_seconds": round(stats.load_seconds, 4),
        "combine": run.arguments.combine or format_weights(models.weights),
        "weights": models.weights,
        "models": models.folders,
        "processes": run.distributed.processes,
        "tensor_parallel": run.distributed.tp_size,
    }
    if run.references and outputs.texts and len(run.references) == stats.lines:
        report |= scores([outputs.texts[line] for line in range(stats.lines)], run.references, run.options.target)
    return report


def scores(hypotheses: Sequence[str], references: Sequence[str], target: str) -> dict[str, Any]:
    """BLEU under 13a and the target language's own tokenizer, and chrF: each score and its signature."""
    found: dict[str, Any] = {}
    for metric in text_metrics(["bleu", "chrf"], references, target):
        found[metric.key] = metric.metric.corpus_score(list(hypotheses), None).score
        found[f"{metric.key}_signature"] = metric.metric.get_signature().format()
    return found


def versions() -> dict[str, str]:
    """Python and the packages that decide a translation or its score."""
    return machine.versions("torch", "collab-mt", "safetensors", "tokenizers", "sacrebleu", "triton")


def summary(report: Mapping[str, Any]) -> list[str]:
    """The lines that a user reads at the end."""
    found = []
    for kind in ("skipped", "truncated"):
        if lines := report[f"{kind}_lines"]:
            more = f" and {report[f'{kind}_count'] - len(lines):,} more" if f"{kind}_count" in report else ""
            found.append(f"{kind}, too long for a context: line {', '.join(map(str, lines))}{more}")
    resumed = f" ({report['resumed_sentences']:,} by an earlier run)" if report["resumed_sentences"] else ""
    first = report["first_token_seconds"]
    found.append(
        f"{report['sentences']:,} sentences{resumed}, {report['output_tokens']:,} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['sentences_per_second']:,.1f} sentences/s"
        + ("" if first is None else f"; first token after {first:.2f} s")
    )
    scored = [key.removesuffix("_signature") for key in report if key.endswith("_signature")]
    return found + [f"{key} {report[key]:.2f}  {report[f'{key}_signature']}" for key in scored]


def write_report(path: str, report: Mapping[str, Any]) -> None:
    """Write the JSON atomically."""
    try:
        atomic_write(Path(path), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
