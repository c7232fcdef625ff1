"""Sentences of a study side by side: the paper's Table 3, and those on which the systems differ most."""

from collections.abc import Mapping, Sequence

from corpora.metrics import text_metrics
from eval.paper_figures import shown_sentence
from eval.report_data import Results
from eval.tables import MISSING, Column, Inline, Row, Table, number

SHOWN = 10  # sentences on which systems differ most, over all directions
SYSTEMS = ("original", "finetuning", "proxy", "collab", "fitted")
LEAST_MENTIONS = 3  # of the words of Table 3's reference, for a sentence to be the paper's


def table_3(results: Results) -> Table | None:
    """The paper's own sentence through its five systems; None where the test text does not contain it."""
    sentence = shown_sentence()
    direction = sentence["direction"]
    references = results.lines(results.data["directions"].get(direction, {}).get("reference_file"))
    if not references:
        return None
    mentions = [sum(word.lower() in line.lower() for word in sentence["reference_mentions"]) for line in references]
    index = mentions.index(max(mentions))
    if mentions[index] < LEAST_MENTIONS:
        return None
    # The paper's small model is this study's, and its 3B is the first large one.
    models = {"1B": results.data.get("small") or "", "3B": results.larges[0] if results.larges else ""}
    names = {}
    for paper_name, fact in sentence["shown"].items():
        model, _, suffix = paper_name.rpartition(".")
        names[f"{models[model]}.{suffix}"] = fact
    systems = {name: results.translations(name, direction) for name in names}
    facts = ["", "", *names.values()]
    rows = _texts(results, direction, index, systems)
    if results.compares:
        rows = [{**row, Column("in the paper", "long"): fact} for row, fact in zip(rows, facts[-len(rows) :])]
    notes = ["in the paper: what its Table 3 shows of each system."] if results.compares else []
    return Table("table3", f"Table 3: one {direction} sentence (line {index + 1:,} of the test text)", [rows], notes)


def differing_sentences(results: Results, count: int = SHOWN) -> list[Table]:
    """A table for each sentence with the largest spread of sentence-level chrF over the first large model's systems.

    `count` sentences in all, shared by the directions whose texts are there.
    """
    translated = {}
    for direction in results.directions:
        names = [f"{large}.{suffix}" for large in results.larges[:1] for suffix in SYSTEMS]
        systems = {name: lines for name in names if (lines := results.translations(name, direction))}
        if len(systems) > 1:
            translated[direction] = systems
    tables = []
    for index, (direction, systems) in enumerate(translated.items()):
        share = count // len(translated) + (index < count % len(translated))
        tables += _most_different(results, direction, systems, share)
    return tables


def _most_different(results: Results, direction: str, systems: dict[str, list[str]], count: int) -> list[Table]:
    references = results.lines(results.data["directions"][direction].get("reference_file"))
    if references is None:
        return []
    scores = list(zip(*(sentence_chrf(lines, references) for lines in systems.values())))  # by sentence, then system
    spreads = [max(values) - min(values) for values in scores]
    tables = []
    for index in sorted(range(len(spreads)), key=lambda index: (-spreads[index], index))[:count]:
        values = scores[index]
        rows = _texts(results, direction, index, systems)
        cells = [*[""] * (len(rows) - len(values)), *(number(value, 1) for value in values)]
        rows = [{**row, Column("chrF2", "number"): cell} for row, cell in zip(rows, cells)]
        title = f"{direction}, line {index + 1:,}: chrF2 from {min(values):.1f} to {max(values):.1f}"
        tables.append(Table(f"sentence-{direction}-{index + 1}", title, [rows]))
    return tables


def sentence_chrf(lines: Sequence[str], references: Sequence[str]) -> list[float]:
    """sacrebleu's chrF2 of each line against its reference."""
    (chrf,) = text_metrics(["chrf"], references, None)
    return [chrf.metric.sentence_score(line, [reference]).score for line, reference in zip(lines, references)]


def _texts(results: Results, direction: str, index: int, systems: Mapping[str, list[str] | None]) -> list[Row]:
    """A sentence's source and reference, where they are there, and its translations."""
    entry = results.data["directions"][direction]
    texts: list[tuple[Inline, list[str] | None]] = []
    for name in ("source", "reference"):
        lines = results.lines(entry.get(f"{name}_file"))
        texts += [(name, lines)] if lines else []
    for name, lines in systems.items():
        label = results.label(name, by_method=True)
        texts.append((f"{results.large_of(name)} {label}" if isinstance(label, str) else label, lines))
    return [
        {Column("system"): label, Column("text", "long"): MISSING if lines is None else lines[index] or "(empty)"}
        for label, lines in texts
    ]
