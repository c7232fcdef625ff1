"""What `decode.bench` measures beside a plain step: how it grows, whole sets of sentences, speculation.

Whole runs here, prefill included: seconds from the prompts to the last token, models loaded before.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from corpora.metrics import text_metrics
from corpora.pairs import one_line
from decode.bench_measure import Bench, Case, System, compare, shares, step_rows
from decode.bench_shapes import Models, random_prompts, step_work
from decode.bench_systems import STOP
from decode.bench_worker import Refused, Worker
from minillama import Tokenizer

TRANSFORMERS_SENTENCES = 100  # of the sentence sweep; its time grows with the number, so more would say no more
RANDOM_NEW_TOKENS, RANDOM_STOPS = 64, 40


@dataclass(frozen=True)
class Text:
    """Prompts to be continued until a stop token; references where they are real sentences in need of a score."""

    prompts: dict[str, list[list[int]]]
    stops: list[int]
    new_tokens: int
    target: str = ""
    references: list[str] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.prompts.values())))

    def repeated(self, count: int) -> "Text":
        """`count` prompts: the first ones, over and over where there are not as many."""
        prompts = {name: [rows[index % len(rows)] for index in range(count)] for name, rows in self.prompts.items()}
        return replace(self, prompts=prompts, references=None)


def random_text(models: Models, count: int) -> Text:
    """Ragged prompts for random models, which end by no will of their own: every 40th token is a stop token."""
    vocabulary = models.configs()[0].vocab_size
    rows = random_prompts(vocabulary, count, 8, 48)
    return Text(dict.fromkeys(models.folders, rows), list(range(7, vocabulary, RANDOM_STOPS)), RANDOM_NEW_TOKENS)


def equal_cases(models: Models, batches: Sequence[int], prompt: int, steps: int) -> list[Case]:
    """Batches of random prompts of one length, the same for all members."""
    vocabulary = models.configs()[0].vocab_size
    return [
        Case(
            dict.fromkeys(models.folders, random_prompts(vocabulary, batch, prompt, prompt, seed=batch)),
            batch,
            steps,
            prompt + steps / 2,
        )
        for batch in batches
    ]


def member_rows(
    bench: Bench, systems: Sequence[System], models: Models, counts: Sequence[int], prompt: int, steps: int
) -> list[dict[str, Any]]:
    """One row at a time, 1 to so many members."""
    rows = []
    for count in counts:
        part = models.first(count)
        rows += step_rows(bench, systems, part, equal_cases(part, [1], prompt, steps))
    return rows


def context_rows(
    bench: Bench, systems: Sequence[System], models: Models, contexts: Sequence[int], batch: int, steps: int
) -> list[dict[str, Any]]:
    """Steps behind prompts of growing length; the last step ends at the context named."""
    rows = []
    for context in contexts:
        cases = equal_cases(models, [batch], max(1, context - steps), steps)
        rows += [row | {"context": context} for row in step_rows(bench, systems, models, cases)]
    return rows


def text_rows(
    bench: Bench,
    systems: Sequence[System],
    models: Models,
    text: Text,
    batch: int,
    orders: Sequence[bool] = (False,),
    own_batches: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """All sentences through every system: ours as they come, transformers in static padded batches.

    orders: whether transformers gets them longest first, which pads less.   own_batches: our rows in flight, where that
    is not `batch`, the others'. Ratios are to its input order; tokens are
    compared with transformers in the same dtype where it runs.
    """
    workers: dict[System, Worker] = {}
    for system in systems:
        if (worker := bench.start(system, models, text.stops)) is not None:
            workers[system] = worker
    runs = [
        (system, longest_first, rows)
        for system in workers
        for longest_first in (orders if system.name == "transformers" else (False,))
        for rows in (own_batches or (batch,) if system.name == "ours" else (batch,))
    ]
    seconds: dict[tuple[System, bool, int], list[float]] = {run: [] for run in runs}
    stolen: dict[tuple[System, bool, int], list[float]] = {run: [] for run in runs}
    last: dict[tuple[System, bool, int], dict[str, Any]] = {}
    memory: dict[System, dict[str, float]] = {}
    arguments = {"new_tokens": text.new_tokens, "ignore_eos": False}
    try:
        for worker in workers.values():
            worker.ask("generate", prompts=text.repeated(min(len(text), batch)).prompts, batch=batch, **arguments)
        for _ in range(bench.rounds):
            for run in runs:
                how = {"batch": run[2]} | ({"longest_first": True} if run[1] else {})
                ask = functools.partial(workers[run[0]].ask, "generate", prompts=text.prompts, **arguments, **how)
                last[run], share = bench.quietly(ask)
                seconds[run].append(last[run]["seconds"])
                stolen[run].append(share)
        memory = {system: worker.ask("peak") for system, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    baseline = next((run for run in runs if run[0].name == "transformers" and not run[1]), None)
    tokenizer = Tokenizer.from_pretrained(next(iter(models.folders.values()))) if text.references else None
    rows = []
    for run in runs:
        system, longest_first, in_flight = run
        row = _text_row(system, models, in_flight, text, last[run], seconds[run], stolen[run]) | memory[system]
        row["order"] = "longest first" if longest_first else "continuous" if system.name == "ours" else "input"
        if baseline is not None:
            row["ratio_to_transformers"] = round(statistics.median(seconds[baseline]) / row["seconds"], 3)
            same = next((r for r in runs if r[0].name == "transformers" and system.computes_like(r[0])), baseline)
            expected, alike = last[same]["tokens"], system.computes_like(same[0])
            row |= compare(bench, models, text.prompts, same[0], expected, last[run]["tokens"], text.stops, alike)
        if tokenizer is not None and text.references is not None:
            row |= _score(tokenizer, last[run]["tokens"], text.references, text.target)
        rows.append(row)
    return rows


def _text_row(
    system: System,
    models: Models,
    batch: int,
    text: Text,
    result: dict[str, Any],
    seconds: list[float],
    stolen: list[float],
) -> dict[str, Any]:
    made = sum(len(row) - (row[-1:] == [STOP]) for row in result["tokens"])
    median = statistics.median(seconds)
    return {
        "shape": models.shape,
        "system": system.name,
        "dtype": system.dtype,
        "batch": batch,
        "members": len(models.folders),
        "combine": models.combine,
        "sentences": len(text),
        "output_tokens": made,
        "seconds": round(median, 3),
        "seconds_of_rounds": [round(value, 3) for value in seconds],
        "stolen_of_rounds": shares(stolen),
        "steps": result["steps"],
        "tokens_per_second": round(made / median, 1),
        "sentences_per_second": round(len(text) / median, 2),
        "ms_per_step": round(median * 1e3 / result["steps"], 3),
        "ratio_to_transformers": None,
        "tokens_equal": None,
    }


def _score(tokenizer: Tokenizer, tokens: list[list[int]], references: list[str], target: str) -> dict[str, Any]:
    """BLEU and its signature: what a storage of the weights costs, beside what it gains."""
    lines = [one_line(tokenizer.decode([token for token in row if token != STOP])).strip() for row in tokens]
    (bleu,) = text_metrics(["bleu"], references, target)
    score = bleu.metric.corpus_score(lines, None).score
    return {"bleu": round(score, 2), "bleu_signature": bleu.metric.get_signature().format()}


def sentence_rows(
    bench: Bench, systems: Sequence[System], models: Models, text: Text, counts: Sequence[int], batch: int
) -> list[dict[str, Any]]:
    """Throughput over the number of sentences; transformers at the smallest numbers only."""
    rows = []
    for count in counts:
        some = [s for s in systems if s.name == "ours" or count <= TRANSFORMERS_SENTENCES]
        once = replace(bench, rounds=1) if count > TRANSFORMERS_SENTENCES else bench
        rows += text_rows(once, some, models, text.repeated(count), batch)
    return rows


def speculation_rows(
    bench: Bench, system: System, models: Models, text: Text, batch: int, settings: Sequence[str | int]
) -> list[dict[str, Any]]:
    """Speculation off and on, in turns: speed against plain decoding, what the run reports, tokens against plain ones.

    acceptance: by drafter, the kept part of what it drafted. Differences are judged by transformers, where it computes
    alike: a tie, or a fault.
    """
    worker = bench.start(system, models, text.stops)
    if worker is None:
        return []
    arguments = {"prompts": text.prompts, "new_tokens": text.new_tokens, "batch": batch, "ignore_eos": False}
    seconds: dict[str | int, list[float]] = {setting: [] for setting in settings}
    stolen: dict[str | int, list[float]] = {setting: [] for setting in settings}
    last: dict[str | int, dict[str, Any]] = {}
    try:
        for setting in settings:
            short = arguments | {"prompts": text.repeated(min(len(text), batch)).prompts}
            worker.ask("generate", options={"speculate": setting}, **short)
        for _ in range(bench.rounds):
            for setting in settings:
                ask = functools.partial(worker.ask, "generate", options={"speculate": setting}, **arguments)
                last[setting], share = bench.quietly(ask)
                seconds[setting].append(last[setting]["seconds"])
                stolen[setting].append(share)
    except Refused as refusal:
        bench.note(f"speculation: {refusal}")
        return []
    finally:
        worker.close()
    plain = settings[0]
    on_gpu = bench.device != "cpu"
    own = system.dtype in ("float32", "bfloat16") or (on_gpu and system.dtype == "float16")
    reference = System("transformers", system.dtype if own else "float32")
    judge = system.computes_like(reference)
    rows = []
    for setting in settings:
        row = _text_row(system, models, batch, text, last[setting], seconds[setting], stolen[setting])
        reported = last[setting]["reported"]
        row |= {"speculate": setting, "reported": reported}
        row["acceptance"] = {
            name: round(kept / drafted, 3) for name, (drafted, kept) in reported["drafters"].items() if drafted
        }
        if batch == 1:
            row["ratio_computed_for_a_gpu"] = ratio_by_bytes(models, last[plain]["steps"], row["steps"], reported)
        row["ratio_to_plain"] = round(statistics.median(seconds[plain]) / statistics.median(seconds[setting]), 3)
        expected, tokens = last[plain]["tokens"], last[setting]["tokens"]
        rows.append(row | compare(bench, models, text.prompts, reference, expected, tokens, text.stops, judge))
    return rows


def ratio_by_bytes(models: Models, plain_steps: int, steps: int, reported: dict[str, Any]) -> float:
    """Bytes of weights that plain decoding read over those that this run of lone rows read.

    Computed, not measured: the speed against plain decoding where a pass costs its bytes whatever its positions, as on
    a GPU. A member's drafted token is one more pass of it; of a draft it reads its last token in the step's own pass.
    """
    parts = [step_work([config], "float32", 0, 0)[0] for config in models.configs()]
    weights = dict(zip(models.folders, parts))
    drafting = sum(drafted * weights.get(name, 0.0) for name, (drafted, _) in reported["drafters"].items())
    return round(plain_steps * sum(parts) / (steps * sum(parts) + drafting), 3)
