"""Sentences of a study side by side: the paper's Table 3, and those on which the systems differ most."""

from collections.abc import Mapping, Sequence

from corpora.metrics import text_metrics
from eval.document import MISSING, Column, Inline, Row, Span, Table, number
from eval.paper_figures import shown_sentence
from eval.report_input import Study
from eval.report_tables import row_label

SHOWN = 10  # sentences on which systems differ most, over all directions
SYSTEMS = ("original", "finetuning", "proxy", "collab", "fitted")
LEAST_MENTIONS = 3  # of what Table 3's reference mentions, for a sentence to be the paper's


def table_3(study: Study) -> Table | None:
    """The paper's own sentence through its five systems, found by its reference; None where the text has it not."""
    sentence = shown_sentence()
    entry = study.data["directions"].get(sentence.direction)
    references = study.lines(entry.get("reference_file")) if entry else None
    if not entry or not references:
        return None
    mentions = [sum(part.lower() in line.lower() for part in sentence.reference_mentions) for line in references]
    if max(mentions) < LEAST_MENTIONS:
        return None
    place = mentions.index(max(mentions))
    columns = [Column("system"), Column("text", "long")]
    rows = _given(study, sentence.direction, place)
    if study.compares:
        columns.append(Column("in the paper", "long"))
        rows = [Row((*row.cells, "")) for row in rows]
    for name, fact in _shown_rows(study, sentence.shown):
        lines = study.lines(study.cell(name, sentence.direction).get("hypothesis_file"))
        cells = (_system(study, name), _text(study, sentence.direction, lines[place] if lines else None))
        rows.append(Row((*cells, fact) if study.compares else cells))
    title = f"Table 3: one {sentence.direction} sentence (line {place + 1:,} of the test text)"
    notes = ("in the paper: what its Table 3 shows of each system.",) if study.compares else ()
    return Table("table3", title, tuple(columns), tuple(rows), notes)


def _shown_rows(study: Study, shown: Mapping[str, str]) -> list[tuple[str, str]]:
    """The paper's rows by this study's names: its small model, and its first large one for the paper's 3B."""
    large = study.larges[0] if study.larges else ""
    names = {"1B": study.data.get("small") or "", "3B": large}
    return [(f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}", fact) for name, fact in shown.items()]


def differing_sentences(study: Study, count: int = SHOWN) -> list[Table]:
    """A table a sentence: the largest spreads of sentence-level chrF over the first large model's systems.

    Every direction has its share of `count`; directions whose texts are not there have none.
    """
    if not study.larges:
        return []
    tables = []
    directions = [direction for direction in study.directions if len(_systems(study, direction)) > 1]
    for place, direction in enumerate(directions):
        share = count // len(directions) + (place < count % len(directions))
        tables += _most_different(study, direction, share)
    return tables


def _most_different(study: Study, direction: str, count: int) -> list[Table]:
    entry = study.data["directions"][direction]
    references = study.lines(entry.get("reference_file"))
    if references is None:
        return []
    systems = _systems(study, direction)
    scores = {name: sentence_chrf(lines, references) for name, lines in systems.items()}
    spreads = [max(row) - min(row) for row in zip(*scores.values())]
    order = sorted(range(len(spreads)), key=lambda place: (-spreads[place], place))[:count]
    columns = (Column("system"), Column("text", "long"), Column("chrF2", "number"))
    tables = []
    for place in order:
        rows = [Row((*row.cells, ""), row.rule) for row in _given(study, direction, place)]
        for name, lines in systems.items():
            text = _text(study, direction, lines[place])
            rows.append(Row((_system(study, name), text, number(scores[name][place], 1))))
        title = f"{direction}, line {place + 1:,}: chrF2 from {_range(scores, place)}"
        tables.append(Table(f"sentence-{direction}-{place + 1}", title, columns, tuple(rows)))
    return tables


def sentence_chrf(lines: Sequence[str], references: Sequence[str]) -> list[float]:
    """sacrebleu's chrF2 of each line against its reference."""
    (chrf,) = text_metrics(["chrf"], references, None)
    return [chrf.metric.sentence_score(line, [reference]).score for line, reference in zip(lines, references)]


def _systems(study: Study, direction: str) -> dict[str, list[str]]:
    """Translations of the first large model's systems that are compared, those whose texts are there."""
    found = {}
    for suffix in SYSTEMS:
        name = f"{study.larges[0]}.{suffix}"
        lines = study.lines(study.cell(name, direction).get("hypothesis_file"))
        if lines:
            found[name] = lines
    return found


def _given(study: Study, direction: str, place: int) -> list[Row]:
    """Source and reference, above the systems."""
    entry = study.data["directions"][direction]
    rows = []
    for label, key, side in (("source", "source_file", 0), ("reference", "reference_file", 1)):
        lines = study.lines(entry.get(key))
        if lines:
            rows.append(Row((label, Span(lines[place], lang=direction.split("-")[side]))))
    return rows


def _system(study: Study, name: str) -> Inline:
    label = row_label(study, name, by_method=True)
    return f"{study.large_of(name)} {label}" if isinstance(label, str) else label


def _text(study: Study, direction: str, text: str | None) -> Inline:
    return Span(text, lang=direction.split("-")[1]) if text else MISSING if text is None else "(empty)"


def _range(scores: dict[str, list[float]], place: int) -> str:
    values = [row[place] for row in scores.values()]
    return f"{min(values):.1f} to {max(values):.1f}"
