"""A study's tables as data (eval.document.Table): the paper's arrangement, then everything that was measured.

The paper's figures and the difference to ours stand beside them where the study repeats the paper.
"""

from collections.abc import Callable, Sequence
from typing import Any

from eval.document import MISSING, Column, Inline, Row, Table, code, number, strong
from eval.study.expressions import EXPRESSIONS, FITTED
from eval.paper_figures import paper_rows
from eval.report_input import KNOWN, Study

LEVEL = 0.05  # p-values below it are marked
OURS = "fitted: "
FIT_NAMES = {kind: name for kind, (_, name, _) in FITTED.items()}
BASELINES = [name for name in KNOWN if name not in EXPRESSIONS]
GIB = 2**30
MARKS = f"† differs from Proxy-tuning, ‡ from Original with the same L (paired bootstrap, p < {LEVEL})."


def paper_tables(study: Study) -> list[Table]:
    """Tables 2, 4 and 6; of Table 4 the first large model, as in the paper, and only with a Japanese direction."""
    japanese = [direction for direction in study.directions if "ja" in direction.split("-")]
    tables = [_arranged(study, 2, "Original, Fine-tuning, Proxy-tuning, Collab-MT", study.directions)]
    if japanese and study.larges:
        tables.append(_arranged(study, 4, "the rows of Table 6 for Japanese", japanese, study.larges[:1]))
    tables.append(_arranged(study, 6, "which sum of logits", study.directions))
    return tables


def _arranged(
    study: Study,
    table: int,
    title: str,
    directions: Sequence[str],
    larges: Sequence[str] | None = None,
) -> Table:
    larges = study.larges if larges is None else larges
    suffixes = [suffix for suffix, expression in KNOWN.items() if table in expression.tables]
    blocks = [[f"{study.data['small']}.{suffix}" for suffix in BASELINES]] if study.data.get("small") else []
    for large in larges:
        blocks.append([f"{large}.{suffix}" for suffix in suffixes] + study.fitted(large))
    with_bert = table == 2 and any(
        study.score(name, direction, "bertscore") is not None for name in study.rows for direction in directions
    )
    measure = "BLEU/BERTScore" if with_bert else "BLEU"
    columns = [Column("L"), Column("method" if table == 2 else "expression")]
    for direction in directions:
        columns.append(Column("ours" if study.compares else measure, "number", direction))
        if study.compares:
            columns += [Column("paper", "number", direction), Column("difference", "number", direction)]
        if own := study.own_bleu(direction):
            columns.append(Column(f"BLEU {own[1]}", "number", direction))
    rows = []
    for block in blocks:
        best = {direction: _best(study, block, direction) for direction in directions}
        for place, name in enumerate(block):
            cells: list[Inline] = [study.large_of(name), row_label(study, name, by_method=table == 2)]
            for direction in directions:
                cells += _scores(study, name, direction, with_bert, table, best[direction])
                if own := study.own_bleu(direction):
                    cells.append(number(study.score(name, direction, own[0])))
            rows.append(Row(tuple(cells), rule=place == 0))
    notes: list[Inline] = [f"{measure}; bold: the best of an L's rows. {MARKS}"]
    if study.compares:
        notes.append("paper: the figure that the paper reports; difference: our BLEU less the paper's.")
    return Table(f"table{table}", f"Table {table}: {title}", tuple(columns), tuple(rows), tuple(notes))


def row_label(study: Study, name: str, by_method: bool = False) -> Inline:
    """A row's method or expression; a fitted row is named by what it was fitted to."""
    method, expression = study.row_name(name)
    fitted = study.rows.get(name, {}).get("fitted")
    if fitted:
        return f"{OURS}{fitted}"
    if by_method or name.rpartition(".")[2] in BASELINES or not expression:
        return method
    return code(expression)


def _best(study: Study, block: Sequence[str], direction: str) -> str | None:
    """The best BLEU of a block as it is printed; None where all are printed alike."""
    scores = [score for name in block if (score := study.score(name, direction, "bleu")) is not None]
    return number(max(scores)) if len({number(score) for score in scores}) > 1 else None


def _marks(study: Study, name: str, direction: str) -> str:
    marks = ""
    for against, mark in (("proxy", "†"), ("large", "‡")):
        p_value = study.p_value(name, direction, against, "bleu")
        if p_value is not None and p_value < LEVEL:
            marks += mark
    return marks


def _scores(study: Study, name: str, direction: str, with_bert: bool, table: int, best: str | None) -> list[Inline]:
    """Ours, and with a comparison the paper's and the difference."""
    bleu = study.score(name, direction, "bleu")
    text = _pair(bleu, study.score(name, direction, "bertscore") if with_bert else None)
    marks = _marks(study, name, direction)
    shown: Inline = text if bleu is None else (strong(text), marks) if number(bleu) == best else text + marks
    if not study.compares:
        return [shown]
    paper = paper_rows().get(name)
    bert = paper.score("bertscore", direction) if paper and table == 2 else None
    difference = number(_difference(study, name, direction), signed=True)
    return [shown, _pair(_reported(name, "bleu", direction), bert), difference]


def _pair(bleu: float | None, bertscore: float | None) -> str:
    return number(bleu) if bertscore is None else f"{number(bleu)}/{number(bertscore)}"


def all_rows(study: Study) -> list[list[str]]:
    """Every row that the study has or the paper would, a block for each model, then what stands in no table."""
    blocks = []
    for model in study.models():
        suffixes = KNOWN if model in study.larges else BASELINES
        block = [f"{model}.{suffix}" for suffix in suffixes]
        blocks.append([name for name in [*block, *study.fitted(model)] if name in study.rows])
    return [block for block in [*blocks, study.others()] if block]


def score_table(study: Study, direction: str) -> Table | None:
    """Every row's scores for one direction: all metrics, p-values, and the paper's figures where they compare."""
    blocks = [[name for name in block if study.metrics(name, direction)] for block in all_rows(study)]
    names = [name for block in blocks for name in block]
    if not names:
        return None
    labels = {key: metric["label"] for name in names for key, metric in study.metrics(name, direction).items()}
    columns, figures = [Column("L"), Column("expression")], []
    for key, label in labels.items():
        for heading, figure in _measures(study, direction, key):
            shown = {name: figure(name) for name in names}
            if any(text != MISSING for text in shown.values()):
                columns.append(Column(heading, "number", label))
                figures.append(shown)
    rows = tuple(
        Row((study.large_of(name), row_label(study, name), *(shown[name] for shown in figures)), rule=place == 0)
        for block in blocks
        for place, name in enumerate(block)
    )
    notes = ("p Proxy, p L: paired bootstrap against Proxy-tuning and against Original, with the same L.",)
    return Table(f"scores-{direction}", f"{direction}: every row and measure", tuple(columns), rows, notes)


def _measures(study: Study, direction: str, key: str) -> list[tuple[str, Callable[[str], str]]]:
    """(heading, a row's text) of all that is shown of one metric."""
    decimals = 4 if key == "bertscore" else 2

    def p_value(against: str) -> Callable[[str], str]:
        return lambda name: number(study.p_value(name, direction, against, key), 3)

    measures: list[tuple[str, Callable[[str], str]]] = [
        ("score", lambda name: number(study.score(name, direction, key), decimals))
    ]
    if study.compares:
        measures.append(("paper", lambda name: number(_reported(name, key, direction))))
        if key == "bleu":
            measures.append(("difference", lambda name: number(_difference(study, name, direction), signed=True)))
    return [*measures, ("p Proxy", p_value("proxy")), ("p L", p_value("large"))]


def _reported(name: str, key: str, direction: str) -> float | None:
    row = paper_rows().get(name)
    return row.score(key, direction) if row else None


def _difference(study: Study, name: str, direction: str) -> float | None:
    ours, reported = study.score(name, direction, "bleu"), _reported(name, "bleu", direction)
    return None if ours is None or reported is None else ours - reported


def signature_table(study: Study) -> Table | None:
    """Each signature once, with the directions that it was used for."""
    used: dict[tuple[str, str], list[str]] = {}
    for name in study.rows:
        for direction in study.directions:
            for metric in study.metrics(name, direction).values():
                if metric.get("signature"):
                    directions = used.setdefault((metric["label"], metric["signature"]), [])
                    directions += [direction] * (direction not in directions)
    rows = tuple(Row((label, code(mark), ", ".join(directions))) for (label, mark), directions in used.items())
    columns = (Column("measure"), Column("signature"), Column("directions"))
    return Table("signatures", "Signatures", columns, rows) if rows else None


def speed_table(study: Study) -> Table | None:
    """Speed and memory of decoding, by row and direction."""
    parts: tuple[tuple[str, str, float, int], ...] = (
        ("tokens/s", "tokens_per_second", 1, 1),
        ("seconds", "seconds", 1, 1),
        ("output tokens", "output_tokens", 1, 0),
        ("peak GiB", "peak_memory_bytes", GIB, 2),
    )
    blocks = all_rows(study)
    measured = [
        (direction, label, key, unit, decimals)
        for direction in study.directions
        for label, key, unit, decimals in parts
        if any(study.cell(name, direction).get(key) is not None for block in blocks for name in block)
    ]
    if not measured:
        return None
    columns = [Column("L"), Column("expression")]
    columns += [Column(label, "number", direction) for direction, label, *_ in measured]
    rows = []
    for block in blocks:
        for place, name in enumerate(block):
            values = [(study.cell(name, direction).get(key), unit, d) for direction, _, key, unit, d in measured]
            shown = [number(None if value is None else value / unit, d) for value, unit, d in values]
            rows.append(Row((study.large_of(name), row_label(study, name), *shown), rule=place == 0))
    return Table("speed", "Speed and memory of decoding", tuple(columns), tuple(rows))


def fit_table(study: Study) -> Table | None:
    """Fitted weights with standard errors, their likelihood, and the certificate that they are the optimum."""
    fits = [
        (large, direction, kind, fit)
        for large, by_direction in study.data.get("fits", {}).items()
        for direction, kinds in by_direction.items()
        for kind, fit in kinds.items()
    ]
    if not fits:
        return None
    members = list(dict.fromkeys(member for *_, fit in fits for member in fit.get("weights", {})))
    columns = [Column("L"), Column("direction"), Column("fit")]
    columns += [Column(member, "number", "weights") for member in members]
    columns += [
        Column("nats a token", "number"),
        Column("gradient norm", "number"),
        Column("least eigenvalue", "number"),
    ]
    rows = []
    for place, (large, direction, kind, fit) in enumerate(fits):
        new = place == 0 or fits[place - 1][:2] != (large, direction)
        weights = [_weight(fit, member) for member in members]
        certificate = [_exponent(fit.get("gradient_norm")), _exponent(fit.get("smallest_eigenvalue"))]
        nats = number(fit.get("nats_per_token"), 3)
        rows.append(Row((large, direction, FIT_NAMES.get(kind, kind), *weights, nats, *certificate), rule=new))
    note = (
        "weights ± standard errors. The likelihood is convex in the weights: a gradient of zero under a positive least "
        "eigenvalue is its one optimum. BLEU has no such certificate."
    )
    return Table("fits", "Fitted weights", tuple(columns), tuple(rows), (note,))


def _weight(fit: dict[str, Any], member: str) -> str:
    weight, error = fit.get("weights", {}).get(member), fit.get("standard_errors", {}).get(member)
    return number(weight, 3) if error is None else f"{number(weight, 3)} ± {number(error, 3)}"


def _exponent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1e}"


def likelihood_table(study: Study) -> Table | None:
    """Nats a token of every expression on the text that weights were fitted on, fixed and fitted side by side."""
    fits = study.data.get("fits", {})
    pairs = [(large, direction) for large in fits for direction in fits[large]]
    values: dict[str, dict[tuple[str, str], float]] = {}
    for pair in pairs:
        for kind, fit in fits[pair[0]][pair[1]].items():
            for expression, nats in (fit.get("fixed") or {}).items():
                values.setdefault(expression, {}).setdefault(pair, nats)
            if fit.get("nats_per_token") is not None:
                values.setdefault(f"{OURS}{FIT_NAMES.get(kind, kind)}", {})[pair] = fit["nats_per_token"]
    if not values:
        return None
    ordered = sorted(values, key=lambda name: name.startswith(OURS))
    columns = [Column("expression"), *(Column(direction, "number", large) for large, direction in pairs)]
    rows = []
    for place, name in enumerate(ordered):
        own = name.startswith(OURS)
        rule = place == 0 or own != ordered[place - 1].startswith(OURS)
        cells = [number(values[name].get(pair), 3) for pair in pairs]
        rows.append(Row((name if own else code(name), *cells), rule=rule))
    title = "Nats a token on the text that the weights were fitted on"
    return Table("likelihood", title, tuple(columns), tuple(rows))


def direction_table(study: Study) -> Table:
    """What was tested and what weights were fitted on."""
    columns = (
        Column("direction"),
        Column("corpus"),
        Column("test text"),
        Column("sentences", "number"),
        Column("weights fitted on"),
        Column("sentences", "number"),
    )
    rows = []
    for name, entry in study.data["directions"].items():
        counts = [number(entry.get(key), 0) for key in ("sentences", "dev_sentences")]
        texts = [str(entry.get(key) or MISSING) for key in ("corpus", "test", "dev")]
        rows.append(Row((name, texts[0], texts[1], counts[0], texts[2], counts[1])))
    return Table("texts", "Texts", columns, tuple(rows))


def settings_table(study: Study) -> Table | None:
    rows = tuple(Row((code(name), _setting(value))) for name, value in study.data.get("settings", {}).items())
    return Table("settings", "Settings", (Column("setting"), Column("value", "long")), rows) if rows else None


def _setting(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else MISSING if value is None else str(value)


def step_table(study: Study) -> Table | None:
    steps = study.data.get("steps") or []
    rows = tuple(Row((step["name"], number(step.get("seconds"), 1), code(str(step.get("key", ""))))) for step in steps)
    columns = (Column("step"), Column("seconds", "number"), Column("key"))
    return Table("steps", "Steps of the study", columns, rows) if rows else None
