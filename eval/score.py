"""Score translations: `python -m eval.score --hypothesis hyp.txt --reference ref.txt`.

BLEU, chrF and TER of sacrebleu with their signatures, BERTScore, and the p-values of the paired bootstrap against
baseline files. Reads line-aligned text (also gzip and '-'), prints a table, or JSON with `--json`; `--report FILE`
writes the JSON to a file.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpora.languages import language_name
from corpora.metrics import bleu_tokenizers, text_metrics
from corpora.text import display_name, read_lines
from eval.significance import SAMPLES, SEED, compare_means, compare_scores
from eval.table import print_report
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_write

METRICS = ("bleu", "chrf", "chrf++", "ter", "bertscore")
EXAMPLES = """examples:
  python -m eval.score --hypothesis hyp.txt --reference ref.txt --target ja
  python -m eval.score --hypothesis new.txt --baseline old.txt --reference ref.txt --json
  zcat hyp.txt.gz | python -m eval.score --hypothesis - --reference ref.txt --metrics bleu,chrf,bertscore \\
      --bertscore-model roberta-large
"""


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = ("bleu", "chrf"),
    *,
    target: str | None = None,
    baselines: Mapping[str, Sequence[str]] | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    bertscore_batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Score line-aligned translations: BLEU, chrF and TER on 0..100, BERTScore's mean F1 on about 0..1.

    target: language code; it adds BLEU with the language's own tokenizer (key `bleu_ja_mecab`).
    baselines: other translations by name, each compared with `hypotheses` by the paired bootstrap.
    Returns `sentences`, `target`, `metrics` (rows of `key`, `label`, `score`, `signature`), and every score under its
    key and its signature under `KEY_signature`. With baselines also `bootstrap` (samples, seed) and `baselines`, a list
    of `name` and `metrics` (rows of `key`, `score`, `difference` of the hypothesis to it, `p_value`).
    Raises InputError on unequal lengths, no sentences, an unknown metric or a missing model.
    """
    names = _check_metrics(metrics)
    if target is not None:
        language_name(target)
    others = dict(baselines or {})
    _check_aligned({"the hypothesis": hypotheses, **others}, "the reference", references)
    if samples < 1 or seed < 0:
        raise InputError(f"{samples} resamples with seed {seed}, expected at least 1 and a seed of 0 or more")
    systems = [hypotheses, *others.values()]
    rows: list[dict[str, Any]] = []
    compared: list[list[dict[str, Any]]] = [[] for _ in others]

    def add(key: str, label: str, scores: Sequence[float], signature: str, p_values: Sequence[float]) -> None:
        rows.append({"key": key, "label": label, "score": scores[0], "signature": signature})
        for baseline, other, p_value in zip(compared, scores[1:], p_values):
            baseline.append({"key": key, "score": other, "difference": scores[0] - other, "p_value": p_value})

    for metric in text_metrics(names, references, target):
        result = compare_scores(metric, systems, samples, seed)
        add(metric.key, metric.label, result.scores, result.signature, result.p_values)
    if "bertscore" in names:
        from eval.bertscore import load_bertscorer

        scorer = load_bertscorer(
            bertscore_model, bertscore_layers, target=target, device=device, batch_size=bertscore_batch_size
        )
        values = [scorer.f1(system, references) for system in systems]
        means = [sum(system) / len(system) for system in values]
        add("bertscore", "BERTScore F1", means, scorer.signature, compare_means(values, samples, seed))

    report: dict[str, Any] = {"sentences": len(references), "target": target, "metrics": rows}
    for row in rows:
        report[row["key"]] = row["score"]
        report[f"{row['key']}_signature"] = row["signature"]
    if others:
        report["bootstrap"] = {"samples": samples, "seed": seed}
        report["baselines"] = [{"name": name, "metrics": metrics} for name, metrics in zip(others, compared)]
    return report


def _check_metrics(metrics: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip().lower() for name in metrics if name.strip()))
    for name in names or [""]:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}, expected some of {','.join(METRICS)}")
    return names


def _check_aligned(systems: Mapping[str, Sequence[str]], reference: str, references: Sequence[str]) -> None:
    for name, lines in systems.items():
        if len(lines) != len(references):
            counts = f"{name} has {len(lines)} lines and {reference} has {len(references)}"
            raise InputError(f"{counts}, expected the same number")
    if not references:
        raise InputError(f"{reference}: no sentences to score, expected at least one line")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    paths = [arguments.hypothesis, *arguments.baseline]
    if [*paths, arguments.reference].count("-") > 1:
        raise InputError("'-' is given more than once, expected standard input to be one of the files")
    if len(set(arguments.baseline)) < len(arguments.baseline):
        raise InputError("a baseline is given twice, expected different files")
    names = _check_metrics(arguments.metrics.split(","))
    reference, references = display_name(arguments.reference), read_lines(arguments.reference)
    systems = [(display_name(path), read_lines(path)) for path in paths]
    _check_aligned(dict(systems), reference, references)
    (hypothesis, hypotheses), *baselines = systems
    tokenizers = ", ".join(bleu_tokenizers(arguments.target))
    metrics = ", ".join(f"bleu ({tokenizers})" if name == "bleu" else name for name in names)
    against = f", bootstrap of {arguments.samples} against {len(baselines)} baseline(s)" if baselines else ""
    print(f"scoring {len(references):,} sentences of {hypothesis}: {metrics}{against}", file=sys.stderr)
    scores = score(hypotheses, references, names, baselines=dict(baselines), **score_options(arguments))
    report = {"hypothesis": hypothesis, "reference": reference, **scores}
    as_json = json.dumps(report, ensure_ascii=False, indent=2)
    if arguments.report:
        try:
            atomic_write(Path(arguments.report), as_json + "\n")
        except OSError as error:
            raise InputError(f"{arguments.report}: cannot be written ({error.strerror})") from None
    if arguments.json:
        print(as_json)
    else:
        print_report(report)
    return 0


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that scores; `score_options` passes them to `score`."""
    add = parser.add_argument
    add("--reference", required=True, metavar="FILE", help="reference translations, line-aligned")
    add("--metrics", default="bleu,chrf", metavar="LIST", help=f"some of {','.join(METRICS)} (default: bleu,chrf)")
    add("--target", metavar="CODE", help="target language; adds BLEU with its own tokenizer (ja, zh, ko)")
    add("--samples", type=int, default=SAMPLES, help=f"resamples of the paired bootstrap (default: {SAMPLES})")
    add("--seed", type=int, default=SEED, help=f"seed of the resampling (default: {SEED}, sacrebleu's)")
    add("--bertscore-model", metavar="NAME|DIR", help="encoder (default: bert-score's for the target language)")
    add("--bertscore-layers", type=int, metavar="N", help="layer to use (default: bert-score's; required for a DIR)")
    add("--batch-size", type=int, default=64, help="sentences in a batch of the encoder (default: 64)")
    add("--device", default="auto", help="device of the encoder: auto, cpu, cuda (default: auto)")


def score_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `score` from the options of a command."""
    names = ("target", "samples", "seed", "bertscore_model", "bertscore_layers", "device")
    return {"bertscore_batch_size": arguments.batch_size, **{name: getattr(arguments, name) for name in names}}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.score",
        description="Score translations against references: BLEU, chrF, TER (sacrebleu) and BERTScore.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--hypothesis", required=True, metavar="FILE", help="translations, one per line ('-' is standard input)")
    add("--baseline", action="append", default=[], metavar="FILE", help="compare with these translations; repeatable")
    add_score_options(parser)
    add("--json", action="store_true", help="print JSON")
    add("--report", metavar="FILE", help="also write the JSON to a file")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
