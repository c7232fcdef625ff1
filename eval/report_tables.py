"""The report's tables: the paper's arrangement, every score, and the fitted weights.

If the study repeats the paper, the paper's figures and the difference to ours stand beside ours.
"""

from collections.abc import Sequence
from typing import Any

from eval.paper_figures import paper_figures, paper_score
from eval.report_data import BASELINES, KNOWN, Results, model_of
from eval.study.expressions import FITTED, MEMBERS
from eval.tables import MISSING, Inline, Row, Span, Table, code, number

P_LEVEL = 0.05  # p-values below it are marked
MARKS = f"† differs from Proxy-tuning, ‡ from Original with the same L (paired bootstrap, p < {P_LEVEL})."
LEAST_MENTIONS = 3  # of the words of Table 3's reference, for a sentence to be the paper's


def paper_tables(results: Results) -> list[Table]:
    """Tables 2, 3, 4 and 6. Table 3 needs the paper's sentence; Table 4, of the first large model as in the paper, a
    Japanese direction.
    """
    directions, larges = results.directions, results.data["larges"]
    title = "Table 2: Original, Fine-tuning, Proxy-tuning, Collab-MT"
    tables = [_paper_table(results, 2, title, directions, larges), *_table_3(results)]
    if japanese := [direction for direction in directions if "ja" in direction.split("-")]:
        tables.append(_paper_table(results, 4, "Table 4: the rows of Table 6 for Japanese", japanese, larges[:1]))
    return [*tables, _paper_table(results, 6, "Table 6: which sum of logits", directions, larges)]


def _paper_table(results: Results, table: int, title: str, directions: Sequence[str], larges: Sequence[str]) -> Table:
    blocks = [[f"{results.data['small']}.{suffix}" for suffix in BASELINES]]
    for large in larges:
        suffixes = [suffix for suffix, expression in KNOWN.items() if table in expression.tables]
        blocks.append([f"{large}.{suffix}" for suffix in suffixes] + results.fitted(large))
    with_bertscore = table == 2 and any("bertscore" in results.labels(direction) for direction in directions)
    measure = "BLEU/BERTScore" if with_bertscore else "BLEU"

    def row(name: str, block: Sequence[str]) -> Row:
        cells: dict[str, Inline] = {"L": model_of(name)}
        cells["method" if table == 2 else "expression"] = results.label(name, by_method=table == 2)
        for direction in directions:
            bertscore = results.score(name, direction, "bertscore") if with_bertscore else None
            text = _pair(results.score(name, direction, "bleu"), bertscore)
            head = f"{direction} {'ours' if results.compares else measure}"
            cells[head] = _marked(results, name, direction, block, text)
            if results.compares:
                bertscore = paper_score(name, "bertscore", direction) if table == 2 else None
                cells[f"{direction} paper"] = _pair(paper_score(name, "bleu", direction), bertscore)
                cells[f"{direction} difference"] = _difference(results, name, direction)
            if own := results.own_bleu(direction):
                cells[f"{direction} {results.labels(direction)[own]}"] = number(results.score(name, direction, own))
        return cells

    notes = [f"{measure}; bold: the best of an L's rows. {MARKS}"]
    if results.compares:
        notes.append("paper: the figure that the paper reports; difference: our BLEU less the paper's.")
    return Table(f"table{table}", title, [[row(name, block) for name in block] for block in blocks], 2, notes)


def _marked(results: Results, name: str, direction: str, block: Sequence[str], text: str) -> Inline:
    """A score with marks of significance, bold if it is the best BLEU of its block and not all are printed alike."""
    marks = ""
    for against, mark in (("proxy", "†"), ("large", "‡")):
        p_value = results.p_value(name, direction, against, "bleu")
        marks += mark if p_value is not None and p_value < P_LEVEL else ""
    scores = {other: score for other in block if (score := results.score(other, direction, "bleu")) is not None}
    printed = set(map(number, scores.values()))
    best = name in scores and len(printed) > 1 and number(scores[name]) == number(max(scores.values()))
    return (Span(text, "strong"), marks) if best else text + marks


def _pair(bleu: float | None, bertscore: float | None) -> str:
    return number(bleu) if bertscore is None else f"{number(bleu)}/{number(bertscore)}"


def _difference(results: Results, name: str, direction: str) -> str:
    ours, reported = results.score(name, direction, "bleu"), paper_score(name, "bleu", direction)
    return number(None if ours is None or reported is None else ours - reported, signed=True)


def _table_3(results: Results) -> list[Table]:
    """The paper's own sentence through its five systems; no table where the test text does not contain it."""
    sentence = paper_figures()["table3"]
    direction = sentence["direction"]
    files = results.data["directions"].get(direction, {})
    references = results.lines(files.get("reference_file"))
    mentions = [sum(word.lower() in line.lower() for word in sentence["reference_mentions"]) for line in references]
    if max(mentions, default=0) < LEAST_MENTIONS:
        return []
    index = mentions.index(max(mentions))
    texts = [("source", results.lines(files["source_file"]), ""), ("reference", references, "")]
    # The paper's small model is this study's, and its 3B is the first large one.
    models = {"1B": results.data["small"], "3B": results.data["larges"][0]}
    for system, fact in sentence["shown"].items():
        model, _, suffix = system.rpartition(".")
        lines = results.lines(results.cell(f"{models[model]}.{suffix}", direction).get("hypothesis_file"))
        texts.append((f"{models[model]} {KNOWN[suffix].method}", lines, fact))
    rows = [
        {"system": label, "text": lines[index] or "(empty)" if lines else MISSING, "in the paper": fact}
        for label, lines, fact in texts
    ]
    title = f"Table 3: one {direction} sentence (line {index + 1:,} of the test text)"
    return [Table("table3", title, [rows], 3, ["in the paper: what its Table 3 shows of each system."])]


def score_table(results: Results, direction: str) -> Table:
    """Every row's scores for one direction: all metrics, p-values, the paper's figures, NLL on the dev text."""

    def row(name: str) -> Row:
        cells: dict[str, Inline] = {"L": model_of(name), "expression": results.label(name)}
        for key, label in results.labels(direction).items():
            score = results.score(name, direction, key)
            cells[f"{label} score"] = number(score, 4 if key == "bertscore" else 2)
            if results.compares:
                cells[f"{label} paper"] = number(paper_score(name, key, direction))
            if results.compares and key == "bleu":
                cells[f"{label} difference"] = _difference(results, name, direction)
            cells[f"{label} p Proxy"] = number(results.p_value(name, direction, "proxy", key), 3)
            cells[f"{label} p L"] = number(results.p_value(name, direction, "large", key), 3)
        cells["nats per token"] = number(results.cell(name, direction).get("nats_per_token"), 3)
        return cells

    notes = [
        "p Proxy, p L: paired bootstrap against Proxy-tuning and against Original, with the same L.",
        "nats per token: of the text that weights were fitted on.",
    ]
    blocks = [[row(name) for name in block] for block in results.blocks()]
    return Table(f"scores-{direction}", f"{direction}: every row and measure", blocks, 2, notes)


def signature_table(results: Results) -> Table:
    """Each signature once, with the directions that it was used for."""
    used: dict[tuple[str, str], dict[str, None]] = {}
    for row in results.rows.values():
        for direction, cell in row["cells"].items():
            for metric in cell["metrics"]:
                used.setdefault((metric["label"], metric["signature"]), {})[direction] = None
    rows: list[Row] = [
        {"measure": label, "signature": code(signature), "directions": ", ".join(directions)}
        for (label, signature), directions in used.items()
    ]
    return Table("signatures", "Signatures", [rows], 3)


def fit_table(results: Results) -> Table:
    """Fitted weights with standard errors, their likelihood, and the certificate that they are the optimum."""
    blocks: list[list[Row]] = []
    for large, by_direction in results.data["fits"].items():
        for direction, kinds in by_direction.items():
            blocks.append([_fit_row(large, direction, kind, fit) for kind, fit in kinds.items()])
    note = (
        "weights ± standard errors. The likelihood is convex in the weights: a gradient of zero under a positive least "
        "eigenvalue is its one optimum."
    )
    return Table("fits", "Fitted weights", blocks, 3, [note])


def _fit_row(large: str, direction: str, kind: str, fit: dict[str, Any]) -> Row:
    cells: dict[str, Inline] = {"L": large, "direction": direction, "fit": FITTED[kind][1]}
    for member in MEMBERS:
        error = fit["standard_errors"].get(member)
        weight = number(fit["weights"].get(member), 3)
        cells[f"weights {member}"] = weight if error is None else f"{weight} ± {number(error, 3)}"
    cells["nats per token"] = number(fit["nats_per_token"], 3)
    for label, key in (("gradient norm", "gradient_norm"), ("least eigenvalue", "smallest_eigenvalue")):
        cells[label] = f"{fit[key]:.1e}" if key in fit else MISSING
    return cells
