"""Run files as tables for docs/results.md: what each kind of run holds, and what of it a reader wants to see."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.document import MISSING, Block, Column, Heading, Inline, Paragraph, Row, Table, code, number
from eval.report import origin
from eval.report_input import Study
from eval.report_tables import (
    direction_table,
    fit_table,
    likelihood_table,
    paper_tables,
    score_table,
    signature_table,
    speed_table,
)

# Of a path, alone or behind NAME=: where a file lay on that machine helps nobody.
FOLDERS = re.compile(r"(?:^|(?<==))/.*/")


@dataclass(frozen=True)
class Part:
    """One block of the page; a folded table opens on a click."""

    block: Block
    folded: bool = False


Value = Callable[[Mapping[str, Any]], Any]
Spec = tuple[str, str | Value, int | None]  # a column: its head, a key or a function of the row, decimals (None: text)


def study(data: dict[str, Any], path: Path) -> list[Part]:
    """results.json of `eval.paper`: our own figures in the paper's tables, fits, likelihoods, speed; measures folded.

    The paper's figures and the differences to them are the report's: this page holds what its run files hold.
    """
    settings = data.get("settings", {}) | {"compare_with_paper": False}
    given = Study(data | {"settings": settings}, path.parent)
    tables = [
        direction_table(given),
        *paper_tables(given),
        fit_table(given),
        likelihood_table(given),
        speed_table(given),
    ]
    folded = [*(score_table(given, direction) for direction in given.directions), signature_table(given)]
    return [
        Part(Heading(3, data["title"])),
        *(Part(Paragraph(text)) for text in origin(given)),
        *(Part(table) for table in tables if table is not None),
        *(Part(table, folded=True) for table in folded if table is not None),
    ]


def scores(data: dict[str, Any], path: Path) -> list[Part]:
    """The report of `eval.score`: one row a system, p-values against the first."""
    labels = [metric["label"] for metric in data["metrics"]]
    keys = [metric["key"] for metric in data["metrics"]]
    columns = [Column("translations")]
    for label in labels:
        columns += [Column("score", "number", label), Column("p", "number", label)]
    systems: list[tuple[str, list[dict[str, Any]]]] = [(data["hypothesis"], data["metrics"])]
    systems += [(baseline["name"], baseline["metrics"]) for baseline in data.get("baselines", [])]
    rows = []
    for name, metrics in systems:
        by_key = {metric["key"]: metric for metric in metrics}
        cells: list[Inline] = [code(Path(name).stem)]
        for key in keys:
            decimals = 4 if key == "bertscore" else 2
            cells += [number(by_key[key]["score"], decimals), number(by_key[key].get("p_value"), 3)]
        rows.append(Row(tuple(cells)))
    samples = data.get("bootstrap", {}).get("samples")
    against = f" p: paired bootstrap of {samples:,} against the first row." if samples else ""
    notes = [f"{data['sentences']:,} sentences.{against}"]
    signatures = [("Signatures: ", *_joined([code(metric["signature"]) for metric in data["metrics"]]), ".")]
    table = Table("scores", "Scores", tuple(columns), tuple(rows), (*notes, *signatures))
    return [Part(table)]


def kernels(data: dict[str, Any], path: Path) -> list[Part]:
    """A run of `kernels.bench`, on a CPU or a GPU."""
    kind = "gpu" if "gpu" in data else "cpu"
    measured = data[kind]
    logits: list[Spec] = [
        *_shape("batch", "members", "vocabulary", "dtype"),
        ("times eager", "times_eager", 2),
        ("GB/s", "gigabytes_per_second", 1),
        ("% of the roof", lambda row: 100 * row["share_of_roof"], 1),
    ]
    bytes_moved: list[Spec] = [
        *_shape("batch", "members", "dtype"),
        ("eager, MiB", lambda row: row["eager_bytes"] / 2**20, 1),
        ("fused, MiB", lambda row: row["fused_bytes"] / 2**20, 1),
        ("times fewer", "ratio", 1),
    ]
    parts = _head(data, measured)
    parts.append(Part(_table("logits", "fused_logits against eager PyTorch", logits, measured["fused_logits"])))
    if "packed_linear" in measured:
        parts += [Part(_packed(measured["packed_linear"]))]
    head = measured.get("fused_head")
    if isinstance(head, dict):
        text = (
            f" scores {head['rows']:,} tokens with {len(head['widths'])} members over {head['vocabulary']:,} entries "
            f"with a peak of {number(head['peak_megabytes_over_weights'], 1)} MB above the weights; "
            f"all logits in bf16 would be {number(head['megabytes_of_all_logits_in_bfloat16'], 1)} MB."
        )
        parts.append(Part(Paragraph((code("fused_head"), text))))
    elif head:
        spec: list[Spec] = [*_shape("batch", "dtype"), ("times cuBLAS and the kernel", "times_unfused", 2)]
        parts.append(Part(_table("head", "fused_head", spec, head)))
    title = "Bytes moved for a token and its log-probability"
    return [*parts, Part(_table("bytes", title, bytes_moved, data["moved_bytes"]), folded=True)]


def _packed(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(rows[0]["ms"])
    spec: list[Spec] = [("rows", "batch", 0), ("layer", lambda row: "{} → {}".format(*row["shape"]), None)]
    spec += [(name, partial(_median, name), 2) for name in names]
    spec.append(("packed float32, times F.linear", "float32_times_linear", 2))
    return _table("linear", "Packed linear layers, median ms", spec, rows)


def _median(name: str, row: Mapping[str, Any]) -> float | None:
    return row["ms"].get(name, {}).get("median_ms")


def decode(data: dict[str, Any], path: Path) -> list[Part]:
    """A run of `decode.bench`: steps against the peers, whole sets of sentences, speculation, growth."""
    machine = data["machine"]
    products = ", ".join(f"{name} {number(speed, 1)} GFLOP/s" for name, speed in machine["matmul_gigaflops"].items())
    reads = f"Memory reads {number(machine['read_gigabytes_per_second'], 2)} GB/s, products {products}, in this run."
    parts = [*_head(data, data), Part(Paragraph(reads))]
    step: list[Spec] = [
        *_shape("batch", "members"),
        ("system", "system", None),
        ("dtype", "dtype", None),
        ("tokens/s", "tokens_per_second", 1),
        ("ms a step", "ms_per_step", 2),
        ("times transformers", "ratio_to_transformers", 2),
        ("% of reads", lambda row: _percent(row.get("share_of_read_bandwidth")), 1),
        ("tokens equal", _equal, None),
        ("peak MB", "peak_memory_megabytes", 0),
    ]
    text: list[Spec] = [
        ("sentences", "sentences", 0),
        ("rows", "batch", 0),
        ("expression", lambda row: code(row["combine"]), None),
        ("system", "system", None),
        ("dtype", "dtype", None),
        ("order", lambda row: row.get("order", MISSING), None),
        ("seconds", "seconds", 2),
        ("tokens/s", "tokens_per_second", 1),
        ("times transformers", "ratio_to_transformers", 2),
        ("translations equal", _equal, None),
        ("BLEU", "bleu", 2),
    ]
    speculation: list[Spec] = [
        *text[:5],
        ("speculate", lambda row: str(row["speculate"]), None),
        *text[6:8],
        ("times plain", "ratio_to_plain", 2),
        ("outputs equal", _equal, None),
    ]
    context: list[Spec] = [("context", "context", 0), *step]
    for key, title, spec in (
        ("rows", "Decoding steps alone", step),
        ("dev", "A whole set of sentences", text),
        ("speculation", "Speculation", speculation),
        ("member_sweep", "Growth with members", step),
        ("context_sweep", "Growth with context", context),
        ("sentence_sweep", "Growth with sentences", text),
    ):
        rows = [row for row in data.get(key, []) if row.get("tokens_per_second") is not None]
        if rows:
            parts.append(Part(_table(key, title, _filled(spec, rows), rows), folded=key.endswith("sweep")))
    notes = [Part(Paragraph(f"Not measured: {note}")) for note in data.get("notes", [])]
    return parts + notes


def train(data: dict[str, Any], path: Path) -> list[Part]:
    """A run of `train.bench`: ours against transformers, and what each measure brings."""
    full, pairs, memory = data["full_sequences"], data["sentence_pairs"], data["large_vocabulary"]
    columns = (Column("what"), Column("ours", "number"), Column("transformers", "number"), Column("ratio", "number"))
    rows = [
        Row((label, number(part["ours_per_second"], 1), number(part["theirs_per_second"], 1), number(part["ratio"])))
        for label, part in (("full sequences, tokens/s", full), ("sentence pairs, target tokens/s", pairs))
    ]
    gib = [f"{number(memory[side] / 2**30)} GiB" for side in ("ours_bytes", "theirs_bytes")]
    label = f"peak memory at {memory['vocabulary']:,} entries"
    rows.append(Row((label, *gib, number(data["peak_memory_ratio"]))))
    steps, most = data["loss_curves"]["steps"], data["loss_difference"]
    curves = f"Loss curves over {steps} steps of the same batches differ by at most {most:.1e}."
    bench = Table("train", f"{data['model']}, {data['dtype']}", columns, tuple(rows), (curves,))
    parts = [*_head(data, data), Part(bench)]
    brings: list[Spec] = [
        ("our step", "layout", None),
        ("seconds", "seconds", 2),
        ("times the one before", "times_the_one_before", 2),
    ]
    if data.get("what_each_brings"):
        parts.append(Part(_table("brings", "What each measure brings", brings, data["what_each_brings"]), folded=True))
    return parts


KINDS: dict[str, Callable[[dict[str, Any], Path], list[Part]]] = {
    "study": study,
    "scores": scores,
    "kernels": kernels,
    "decode": decode,
    "train": train,
}


def _head(data: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Part]:
    """Device, date, versions, and the command where the run has kept it."""
    date = f", {data['date'][:10]}" if data.get("date") else ""
    threads = f", {measured['threads']} threads" if "threads" in measured else ""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    shape = data.get("models", {}).get("shape")
    of = f"{shape}: " if shape else ""
    parts = [Part(Heading(3, f"{of}{data['device']}{threads}{date}"))]
    arguments = shlex.join(FOLDERS.sub("", argument) for argument in data.get("arguments", []))
    command = (code(f"python -m decode.bench {arguments}"), "; ") if arguments else ()
    return [*parts, Part(Paragraph((*command, code(versions))))]


def _table(name: str, title: str, spec: Sequence[Spec], rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = tuple(Column(head, "text" if decimals is None else "number") for head, _, decimals in spec)
    filled = []
    for row in rows:
        cells: list[Inline] = []
        for _, source, decimals in spec:
            value = source(row) if callable(source) else row.get(source)
            cells.append(value if decimals is None and value is not None else number(value, decimals or 0))
        filled.append(Row(tuple(cells)))
    return Table(name, title, columns, tuple(filled))


def _shape(*names: str) -> list[Spec]:
    heads = {"batch": "rows", "vocabulary": "entries"}
    return [(heads.get(name, name), name, None if name == "dtype" else 0) for name in names]


def _filled(spec: Sequence[Spec], rows: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """The columns for which some row has a value."""

    def has(source: str | Value) -> bool:
        return any((source(row) if callable(source) else row.get(source)) not in (None, MISSING) for row in rows)

    return [column for column in spec if has(column[1])]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _equal(row: Mapping[str, Any]) -> str:
    """How many outputs are transformers' own, and of the others how many differ by a tie."""
    if row.get("tokens_equal") is None:
        return MISSING
    ties = f", {row['ties']} ties" if row.get("ties") else ""
    return f"{row['sequences_equal']} of {row['sequences']}{ties}"


def _joined(parts: Sequence[Any]) -> list[Any]:
    return [piece for place, part in enumerate(parts) for piece in ([", "] if place else []) + [part]]
