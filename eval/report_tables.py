"""The report's tables: the paper's arrangement, and everything that was measured. A table may have no rows.

If the study repeats the paper, the paper's figures and the difference to ours stand beside ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

from eval.paper_figures import paper_score
from eval.report_data import BASELINES, FITTED_PREFIX, KNOWN, Results
from eval.study.expressions import FITTED
from eval.tables import MISSING, Column, Inline, Row, Table, code, number, strong

P_LEVEL = 0.05  # p-values below it are marked
GIB = 2**30
MARKS = f"† differs from Proxy-tuning, ‡ from Original with the same L (paired bootstrap, p < {P_LEVEL})."


def _figure(label: str, group: str = "") -> Column:
    return Column(label, "number", group)


def paper_tables(results: Results) -> list[Table]:
    """Tables 2, 4 and 6; of Table 4 the first large model, as in the paper, and only with a Japanese direction."""
    japanese = [direction for direction in results.directions if "ja" in direction.split("-")]
    title = "Table 2: Original, Fine-tuning, Proxy-tuning, Collab-MT"
    tables = [_paper_table(results, 2, title, results.directions, results.larges)]
    if japanese and results.larges:
        title = "Table 4: the rows of Table 6 for Japanese"
        tables.append(_paper_table(results, 4, title, japanese, results.larges[:1]))
    return [*tables, _paper_table(results, 6, "Table 6: which sum of logits", results.directions, results.larges)]


def _paper_table(results: Results, table: int, title: str, directions: Sequence[str], larges: Sequence[str]) -> Table:
    blocks = [[f"{small}.{suffix}" for suffix in BASELINES] for small in results.smalls]
    for large in larges:
        suffixes = [suffix for suffix, expression in KNOWN.items() if table in expression.tables]
        blocks.append([f"{large}.{suffix}" for suffix in suffixes] + results.fitted(large))
    with_bertscore = table == 2 and any(
        results.score(name, direction, "bertscore") is not None for name in results.rows for direction in directions
    )
    measure = "BLEU/BERTScore" if with_bertscore else "BLEU"

    def row(name: str, block: Sequence[str]) -> Row:
        cells = _labels(results, name, by_method=table == 2)
        for direction in directions:
            bertscore = results.score(name, direction, "bertscore") if with_bertscore else None
            ours = _marked(results, name, direction, block, _pair(results.score(name, direction, "bleu"), bertscore))
            cells[_figure("ours" if results.compares else measure, direction)] = ours
            if results.compares:
                bertscore = paper_score(name, "bertscore", direction) if table == 2 else None
                cells[_figure("paper", direction)] = _pair(paper_score(name, "bleu", direction), bertscore)
                cells[_figure("difference", direction)] = _difference(results, name, direction)
            if own := results.own_bleu(direction):
                cells[_figure(f"BLEU {own[1]}", direction)] = number(results.score(name, direction, own[0]))
        return cells

    notes = [f"{measure}; bold: the best of an L's rows. {MARKS}"]
    if results.compares:
        notes.append("paper: the figure that the paper reports; difference: our BLEU less the paper's.")
    return Table(f"table{table}", title, [[row(name, block) for name in block] for block in blocks], notes)


def _labels(results: Results, name: str, by_method: bool = False) -> dict[Column, Inline]:
    """The first cells of a row: its L, and its expression or method."""
    label = results.label(name, by_method)
    return {Column("L"): results.large_of(name), Column("method" if by_method else "expression"): label}


def _marked(results: Results, name: str, direction: str, block: Sequence[str], text: str) -> Inline:
    """A score with marks of significance, bold if it is the best BLEU of its block and not all are printed alike."""
    scores = {other: score for other in block if (score := results.score(other, direction, "bleu")) is not None}
    marks = ""
    for against, mark in (("proxy", "†"), ("large", "‡")):
        p_value = results.p_value(name, direction, against, "bleu")
        marks += mark if p_value is not None and p_value < P_LEVEL else ""
    printed = set(map(number, scores.values()))
    best = name in scores and len(printed) > 1 and number(scores[name]) == number(max(scores.values()))
    return (strong(text), marks) if best else text + marks


def _pair(bleu: float | None, bertscore: float | None) -> str:
    return number(bleu) if bertscore is None else f"{number(bleu)}/{number(bertscore)}"


def _difference(results: Results, name: str, direction: str) -> str:
    ours, reported = results.score(name, direction, "bleu"), paper_score(name, "bleu", direction)
    return number(None if ours is None or reported is None else ours - reported, signed=True)


def score_table(results: Results, direction: str) -> Table:
    """Every row's scores for one direction: all metrics, p-values, and the paper's figures if the study compares."""
    blocks = [[name for name in block if results.metrics(name, direction)] for block in results.blocks()]
    metrics = {
        key: metric["label"]
        for block in blocks
        for name in block
        for key, metric in results.metrics(name, direction).items()
    }

    def row(name: str) -> Row:
        cells = _labels(results, name)
        for key, label in metrics.items():
            score = results.score(name, direction, key)
            cells[_figure("score", label)] = number(score, 4 if key == "bertscore" else 2)
            if results.compares:
                cells[_figure("paper", label)] = number(paper_score(name, key, direction))
            if results.compares and key == "bleu":
                cells[_figure("difference", label)] = _difference(results, name, direction)
            cells[_figure("p Proxy", label)] = number(results.p_value(name, direction, "proxy", key), 3)
            cells[_figure("p L", label)] = number(results.p_value(name, direction, "large", key), 3)
        return cells

    notes = ["p Proxy, p L: paired bootstrap against Proxy-tuning and against Original, with the same L."]
    rows = [[row(name) for name in block] for block in blocks if block]
    return Table(f"scores-{direction}", f"{direction}: every row and measure", rows, notes).without_empty_columns()


def signature_table(results: Results) -> Table:
    """Each signature once, with the directions that it was used for."""
    used: dict[tuple[str, str], dict[str, None]] = {}
    for name in results.rows:
        for direction in results.directions:
            for metric in results.metrics(name, direction).values():
                if metric.get("signature"):
                    used.setdefault((metric["label"], metric["signature"]), {})[direction] = None
    rows: list[Row] = [
        {Column("measure"): label, Column("signature"): code(signature), Column("directions"): ", ".join(directions)}
        for (label, signature), directions in used.items()
    ]
    return Table("signatures", "Signatures", [rows])


def speed_table(results: Results) -> Table:
    """Speed and memory of decoding, by row and direction."""
    figures = {
        "tokens/s": ("tokens_per_second", 1, 1),
        "seconds": ("seconds", 1, 1),
        "output tokens": ("output_tokens", 1, 0),
        "peak GiB": ("peak_memory_bytes", GIB, 2),
    }

    def row(name: str) -> Row:
        cells = _labels(results, name)
        for direction in results.directions:
            for label, (key, unit, decimals) in figures.items():
                value = results.cell(name, direction).get(key)
                cells[_figure(label, direction)] = number(None if value is None else value / unit, decimals)
        return cells

    measured = any(results.cell(name, d).get("tokens_per_second") for name in results.rows for d in results.directions)
    blocks = [[row(name) for name in block] for block in results.blocks()] if measured else []
    return Table("speed", "Speed and memory of decoding", blocks).without_empty_columns()


def fit_table(results: Results) -> Table:
    """Fitted weights with standard errors, their likelihood, and the certificate that they are the optimum."""
    fits = [
        (large, direction, kinds)
        for large, by_direction in results.data.get("fits", {}).items()
        for direction, kinds in by_direction.items()
    ]
    members = list(dict.fromkeys(name for *_, kinds in fits for fit in kinds.values() for name in fit["weights"]))

    def row(large: str, direction: str, kind: str, fit: dict[str, Any]) -> Row:
        cells: dict[Column, Inline] = {Column("L"): large, Column("direction"): direction}
        cells[Column("fit")] = _fit_name(kind)
        for member in members:
            error = fit.get("standard_errors", {}).get(member)
            weight = number(fit["weights"].get(member), 3)
            cells[_figure(member, "weights")] = weight if error is None else f"{weight} ± {number(error, 3)}"
        cells[_figure("nats per token")] = number(fit.get("nats_per_token"), 3)
        for label, key in (("gradient norm", "gradient_norm"), ("least eigenvalue", "smallest_eigenvalue")):
            cells[_figure(label)] = MISSING if fit.get(key) is None else f"{fit[key]:.1e}"
        return cells

    note = (
        "weights ± standard errors. The likelihood is convex in the weights: a gradient of zero under a positive least "
        "eigenvalue is its one optimum."
    )
    blocks = [[row(large, direction, *kind) for kind in kinds.items()] for large, direction, kinds in fits]
    return Table("fits", "Fitted weights", blocks, [note])


def _fit_name(kind: str) -> str:
    return FITTED[kind][1] if kind in FITTED else kind


def likelihood_table(results: Results) -> Table:
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

    def block(values: dict[str, dict[tuple[str, str], float]], label: Callable[[str], Inline]) -> list[Row]:
        return [
            {
                Column("expression"): label(name),
                **{_figure(pair[1], pair[0]): number(nats.get(pair), 3) for pair in pairs},
            }
            for name, nats in values.items()
        ]

    blocks = [rows for rows in (block(fixed, code), block(fitted, str)) if rows]
    return Table("likelihood", "Nats per token on the text that the weights were fitted on", blocks)


def direction_table(results: Results) -> Table:
    """The test text of each direction, and the text that weights were fitted on."""
    rows: list[Row] = [
        {
            Column("direction"): name,
            Column("corpus"): str(entry.get("corpus") or MISSING),
            Column("test text"): str(entry.get("test") or MISSING),
            _figure("sentences"): number(entry.get("sentences"), 0),
            Column("weights fitted on"): str(entry.get("dev") or MISSING),
            _figure("sentences"): number(entry.get("dev_sentences"), 0),
        }
        for name, entry in results.data["directions"].items()
    ]
    return Table("texts", "Texts", [rows])


def settings_table(results: Results) -> Table:
    def text(value: Any) -> str:
        return ("no", "yes")[value] if isinstance(value, bool) else MISSING if value is None else str(value)

    settings = results.data.get("settings", {})
    rows: list[Row] = [
        {Column("setting"): code(name), Column("value", "long"): text(value)} for name, value in settings.items()
    ]
    return Table("settings", "Settings", [rows])


def step_table(results: Results) -> Table:
    rows: list[Row] = [
        {
            Column("step"): step["name"],
            _figure("seconds"): number(step.get("seconds"), 1),
            Column("key"): code(str(step.get("key", ""))),
        }
        for step in results.data.get("steps") or []
    ]
    return Table("steps", "Steps of the study", [rows])
