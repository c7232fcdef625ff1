"""The report's tables: the paper's arrangement, and everything that was measured.

If the study repeats the paper, the paper's figures and the difference to ours stand beside ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

from eval.paper_figures import paper_rows
from eval.report_data import BASELINES, FITTED_PREFIX, KNOWN, Results
from eval.study.expressions import FITTED
from eval.tables import MISSING, Column, Inline, Table, code, number, strong

P_LEVEL = 0.05  # p-values below it are marked
GIB = 2**30
MARKS = f"† differs from Proxy-tuning, ‡ from Original with the same L (paired bootstrap, p < {P_LEVEL})."


def paper_tables(results: Results) -> list[Table]:
    """Tables 2, 4 and 6; of Table 4 the first large model, as in the paper, and only with a Japanese direction."""
    japanese = [direction for direction in results.directions if "ja" in direction.split("-")]
    tables = [_paper_table(results, 2, "Original, Fine-tuning, Proxy-tuning, Collab-MT", results.directions)]
    if japanese and results.larges:
        tables.append(_paper_table(results, 4, "the rows of Table 6 for Japanese", japanese, first_only=True))
    return [*tables, _paper_table(results, 6, "which sum of logits", results.directions)]


def _paper_table(
    results: Results, table: int, title: str, directions: Sequence[str], first_only: bool = False
) -> Table:
    blocks = [[f"{results.data['small']}.{suffix}" for suffix in BASELINES]] if results.data.get("small") else []
    for large in results.larges[:1] if first_only else results.larges:
        suffixes = [suffix for suffix, expression in KNOWN.items() if table in expression.tables]
        blocks.append([f"{large}.{suffix}" for suffix in suffixes] + results.fitted(large))
    with_bertscore = table == 2 and any(
        results.score(name, direction, "bertscore") is not None for name in results.rows for direction in directions
    )
    measure = "BLEU/BERTScore" if with_bertscore else "BLEU"
    columns = [Column("L"), Column("method" if table == 2 else "expression")]
    for direction in directions:
        columns.append(Column("ours" if results.compares else measure, "number", direction))
        if results.compares:
            columns += [Column("paper", "number", direction), Column("difference", "number", direction)]
        if own := results.own_bleu(direction):
            columns.append(Column(f"BLEU {own[1]}", "number", direction))

    def row(name: str, block: list[str]) -> list[Inline]:
        cells: list[Inline] = [results.large_of(name), results.label(name, by_method=table == 2)]
        for direction in directions:
            cells.append(_marked_score(results, name, direction, with_bertscore, block))
            if results.compares:
                bertscore = _reported(name, "bertscore", direction) if table == 2 else None
                cells.append(_pair(_reported(name, "bleu", direction), bertscore))
                cells.append(number(_difference(results, name, direction), signed=True))
            if own := results.own_bleu(direction):
                cells.append(number(results.score(name, direction, own[0])))
        return cells

    notes = [f"{measure}; bold: the best of an L's rows. {MARKS}"]
    if results.compares:
        notes.append("paper: the figure that the paper reports; difference: our BLEU less the paper's.")
    rows = [[row(name, block) for name in block] for block in blocks]
    return Table(f"table{table}", f"Table {table}: {title}", columns, rows, notes)


def _marked_score(results: Results, name: str, direction: str, with_bertscore: bool, block: Sequence[str]) -> Inline:
    """Our BLEU, bold if it is the best of its block and not all are printed alike, with marks of significance."""
    bleu = results.score(name, direction, "bleu")
    text = _pair(bleu, results.score(name, direction, "bertscore") if with_bertscore else None)
    if bleu is None:
        return text
    scores = [score for other in block if (score := results.score(other, direction, "bleu")) is not None]
    marks = ""
    for against, mark in (("proxy", "†"), ("large", "‡")):
        p_value = results.p_value(name, direction, against, "bleu")
        if p_value is not None and p_value < P_LEVEL:
            marks += mark
    best = number(bleu) == number(max(scores)) and len(set(map(number, scores))) > 1
    return (strong(text), marks) if best else text + marks


def _pair(bleu: float | None, bertscore: float | None) -> str:
    return number(bleu) if bertscore is None else f"{number(bleu)}/{number(bertscore)}"


def _reported(name: str, key: str, direction: str) -> float | None:
    """The paper's figure."""
    row = paper_rows().get(name)
    return row.score(key, direction) if row else None


def _difference(results: Results, name: str, direction: str) -> float | None:
    ours, reported = results.score(name, direction, "bleu"), _reported(name, "bleu", direction)
    return None if ours is None or reported is None else ours - reported


def score_table(results: Results, direction: str) -> Table | None:
    """Every row's scores for one direction: all metrics, p-values, and the paper's figures if the study compares."""
    blocks = [[name for name in block if results.metrics(name, direction)] for block in results.blocks()]
    names = [name for block in blocks for name in block]
    labels = {key: metric["label"] for name in names for key, metric in results.metrics(name, direction).items()}
    columns, figures = [Column("L"), Column("expression")], []
    for key, label in labels.items():
        for heading, figure in _measures(results, direction, key):
            shown = {name: figure(name) for name in names}
            if any(text != MISSING for text in shown.values()):
                columns.append(Column(heading, "number", label))
                figures.append(shown)
    rows = [
        [[results.large_of(name), results.label(name), *(shown[name] for shown in figures)] for name in block]
        for block in blocks
        if block
    ]
    notes = ["p Proxy, p L: paired bootstrap against Proxy-tuning and against Original, with the same L."]
    return Table(f"scores-{direction}", f"{direction}: every row and measure", columns, rows, notes) if rows else None


def _measures(results: Results, direction: str, key: str) -> list[tuple[str, Callable[[str], str]]]:
    """The columns of one metric as (heading, a row's text)."""
    decimals = 4 if key == "bertscore" else 2
    measures: list[tuple[str, Callable[[str], str]]] = [
        ("score", lambda name: number(results.score(name, direction, key), decimals))
    ]
    if results.compares:
        measures.append(("paper", lambda name: number(_reported(name, key, direction))))
        if key == "bleu":
            measures.append(("difference", lambda name: number(_difference(results, name, direction), signed=True)))
    measures.append(("p Proxy", lambda name: number(results.p_value(name, direction, "proxy", key), 3)))
    measures.append(("p L", lambda name: number(results.p_value(name, direction, "large", key), 3)))
    return measures


def signature_table(results: Results) -> Table | None:
    """Each signature once, with the directions that it was used for."""
    used: dict[tuple[str, str], dict[str, None]] = {}
    for name in results.rows:
        for direction in results.directions:
            for metric in results.metrics(name, direction).values():
                if metric.get("signature"):
                    used.setdefault((metric["label"], metric["signature"]), {})[direction] = None
    rows = [[label, code(signature), ", ".join(directions)] for (label, signature), directions in used.items()]
    columns = [Column("measure"), Column("signature"), Column("directions")]
    return Table("signatures", "Signatures", columns, [rows]) if rows else None


def speed_table(results: Results) -> Table | None:
    """Speed and memory of decoding, by row and direction."""
    measures = (
        ("tokens/s", "tokens_per_second", 1, 1),
        ("seconds", "seconds", 1, 1),
        ("output tokens", "output_tokens", 1, 0),
        ("peak GiB", "peak_memory_bytes", GIB, 2),
    )
    blocks = results.blocks()
    measured = [
        (direction, label, key, unit, decimals)
        for direction in results.directions
        for label, key, unit, decimals in measures
        if any(results.cell(name, direction).get(key) is not None for block in blocks for name in block)
    ]

    def text(name: str, direction: str, key: str, unit: int, decimals: int) -> str:
        value = results.cell(name, direction).get(key)
        return number(None if value is None else value / unit, decimals)

    columns = [Column("L"), Column("expression")]
    columns += [Column(label, "number", direction) for direction, label, *_ in measured]
    rows = [
        [
            [
                results.large_of(name),
                results.label(name),
                *(text(name, direction, *how) for direction, _, *how in measured),
            ]
            for name in block
        ]
        for block in blocks
    ]
    return Table("speed", "Speed and memory of decoding", columns, rows) if measured else None


def fit_table(results: Results) -> Table | None:
    """Fitted weights with standard errors, their likelihood, and the certificate that they are the optimum."""
    fits = results.data.get("fits", {})
    of_pairs = [(large, direction, fits[large][direction]) for large in fits for direction in fits[large]]
    members = list(dict.fromkeys(name for *_, of in of_pairs for fit in of.values() for name in fit.get("weights", {})))
    columns = [Column("L"), Column("direction"), Column("fit")]
    columns += [Column(member, "number", "weights") for member in members]
    columns += [Column(label, "number") for label in ("nats per token", "gradient norm", "least eigenvalue")]
    rows = []
    for large, direction, kinds in of_pairs:
        block = []
        for kind, fit in kinds.items():
            weights = [_weight(fit, member) for member in members]
            certificate = [_exponent(fit.get("gradient_norm")), _exponent(fit.get("smallest_eigenvalue"))]
            nats = number(fit.get("nats_per_token"), 3)
            block.append([large, direction, _fit_name(kind), *weights, nats, *certificate])
        rows.append(block)
    note = (
        "weights ± standard errors. The likelihood is convex in the weights: a gradient of zero under a positive least "
        "eigenvalue is its one optimum."
    )
    return Table("fits", "Fitted weights", columns, rows, [note]) if rows else None


def _fit_name(kind: str) -> str:
    return FITTED[kind][1] if kind in FITTED else kind


def _weight(fit: dict[str, Any], member: str) -> str:
    weight, error = fit.get("weights", {}).get(member), fit.get("standard_errors", {}).get(member)
    return number(weight, 3) if error is None else f"{number(weight, 3)} ± {number(error, 3)}"


def _exponent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1e}"


def likelihood_table(results: Results) -> Table | None:
    """NLL per token of every expression on the text that weights were fitted on: a block of fixed, one of fitted."""
    fits = results.data.get("fits", {})
    pairs = [(large, direction) for large in fits for direction in fits[large]]
    fixed: dict[str, dict[tuple[str, str], float]] = {}
    fitted: dict[str, dict[tuple[str, str], float]] = {}
    for large, direction in pairs:
        for kind, fit in fits[large][direction].items():
            for expression, nats in (fit.get("fixed") or {}).items():
                fixed.setdefault(expression, {}).setdefault((large, direction), nats)
            if fit.get("nats_per_token") is not None:
                fitted.setdefault(f"{FITTED_PREFIX}{_fit_name(kind)}", {})[large, direction] = fit["nats_per_token"]
    columns = [Column("expression"), *(Column(direction, "number", large) for large, direction in pairs)]
    rows = [
        [[label(name), *(number(nats.get(pair), 3) for pair in pairs)] for name, nats in block.items()]
        for block, label in ((fixed, code), (fitted, str))
        if block
    ]
    title = "Nats per token on the text that the weights were fitted on"
    return Table("likelihood", title, columns, rows) if rows else None


def direction_table(results: Results) -> Table:
    """The test text of each direction, and the text that weights were fitted on."""
    labels = ("direction", "corpus", "test text", "sentences", "weights fitted on", "sentences")
    columns = [Column(label, "number" if label == "sentences" else "text") for label in labels]
    rows = []
    for name, entry in results.data["directions"].items():
        counts = [number(entry.get(key), 0) for key in ("sentences", "dev_sentences")]
        corpus, test, dev = [str(entry.get(key) or MISSING) for key in ("corpus", "test", "dev")]
        rows.append([name, corpus, test, counts[0], dev, counts[1]])
    return Table("texts", "Texts", columns, [rows])


def settings_table(results: Results) -> Table | None:
    rows = [[code(name), _setting(value)] for name, value in results.data.get("settings", {}).items()]
    return Table("settings", "Settings", [Column("setting"), Column("value", "long")], [rows]) if rows else None


def _setting(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else MISSING if value is None else str(value)


def step_table(results: Results) -> Table | None:
    steps = results.data.get("steps") or []
    rows = [[step["name"], number(step.get("seconds"), 1), code(str(step.get("key", "")))] for step in steps]
    columns = [Column("step"), Column("seconds", "number"), Column("key")]
    return Table("steps", "Steps of the study", columns, [rows]) if rows else None
