"""Sentences of a study side by side: the paper's Table 3, and those on which the systems differ most."""

from collections.abc import Sequence

from corpora.metrics import text_metrics
from eval.paper_figures import shown_sentence
from eval.report_data import Results
from eval.tables import MISSING, Column, Inline, Table, number

SHOWN = 10  # sentences on which systems differ most, over all directions
SYSTEMS = ("original", "finetuning", "proxy", "collab", "fitted")
LEAST_MENTIONS = 3  # of the words of Table 3's reference, for a sentence to be the paper's


def table_3(results: Results) -> Table | None:
    """The paper's own sentence through its five systems; None where the test text does not contain it."""
    sentence = shown_sentence()
    direction = sentence.direction
    references = results.lines(results.data["directions"].get(direction, {}).get("reference_file"))
    if not references:
        return None
    mentions = [sum(word.lower() in line.lower() for word in sentence.reference_mentions) for line in references]
    if max(mentions) < LEAST_MENTIONS:
        return None
    index = mentions.index(max(mentions))
    # The paper's small model is this study's, and its 3B is the first large one.
    models = {"1B": results.data.get("small") or "", "3B": results.larges[0] if results.larges else ""}
    rows = [[*row, ""] for row in _source_and_reference(results, direction, index)]
    for paper_name, fact in sentence.shown.items():
        model, _, suffix = paper_name.rpartition(".")
        name = f"{models[model]}.{suffix}"
        lines = results.translations(name, direction)
        rows.append([_system(results, name), _text(lines[index] if lines else None), fact])
    columns = [Column("system"), Column("text", "long"), Column("in the paper", "long")]
    notes = ["in the paper: what its Table 3 shows of each system."]
    if not results.compares:
        columns, rows, notes = columns[:2], [row[:2] for row in rows], []
    title = f"Table 3: one {direction} sentence (line {index + 1:,} of the test text)"
    return Table("table3", title, columns, [rows], notes)


def differing_sentences(results: Results, count: int = SHOWN) -> list[Table]:
    """A table for each sentence with the largest spread of sentence-level chrF over the first large model's systems.

    `count` sentences in all, shared by the directions whose texts are there.
    """
    translated = {
        direction: systems for direction in results.directions if len(systems := _systems(results, direction)) > 1
    }
    tables = []
    for index, (direction, systems) in enumerate(translated.items()):
        share = count // len(translated) + (index < count % len(translated))
        tables += _most_different(results, direction, systems, share)
    return tables


def _most_different(results: Results, direction: str, systems: dict[str, list[str]], count: int) -> list[Table]:
    references = results.lines(results.data["directions"][direction].get("reference_file"))
    if references is None:
        return []
    scores = [sentence_chrf(lines, references) for lines in systems.values()]
    spreads = [max(column) - min(column) for column in zip(*scores)]
    columns = [Column("system"), Column("text", "long"), Column("chrF2", "number")]
    tables = []
    for index in sorted(range(len(spreads)), key=lambda index: (-spreads[index], index))[:count]:
        rows = [[*row, ""] for row in _source_and_reference(results, direction, index)]
        for (name, lines), values in zip(systems.items(), scores):
            rows.append([_system(results, name), _text(lines[index]), number(values[index], 1)])
        lowest, highest = min(values[index] for values in scores), max(values[index] for values in scores)
        title = f"{direction}, line {index + 1:,}: chrF2 from {lowest:.1f} to {highest:.1f}"
        tables.append(Table(f"sentence-{direction}-{index + 1}", title, columns, [rows]))
    return tables


def sentence_chrf(lines: Sequence[str], references: Sequence[str]) -> list[float]:
    """sacrebleu's chrF2 of each line against its reference."""
    (chrf,) = text_metrics(["chrf"], references, None)
    return [chrf.metric.sentence_score(line, [reference]).score for line, reference in zip(lines, references)]


def _systems(results: Results, direction: str) -> dict[str, list[str]]:
    """Translations of the first large model's systems, those whose texts are there."""
    names = [f"{large}.{suffix}" for large in results.larges[:1] for suffix in SYSTEMS]
    return {name: lines for name in names if (lines := results.translations(name, direction))}


def _source_and_reference(results: Results, direction: str, index: int) -> list[list[Inline]]:
    entry = results.data["directions"][direction]
    texts = {"source": results.lines(entry.get("source_file")), "reference": results.lines(entry.get("reference_file"))}
    return [[label, _text(lines[index])] for label, lines in texts.items() if lines]


def _system(results: Results, name: str) -> Inline:
    label = results.label(name, by_method=True)
    return f"{results.large_of(name)} {label}" if isinstance(label, str) else label


def _text(text: str | None) -> str:
    return text or (MISSING if text is None else "(empty)")
