"""Reports of a made-up study: what stands in results.json stands in the tables, whatever is missing in it."""

import json
import re
from collections import Counter

import pytest
from made_study import made_study

from eval import report
from eval.paper_figures import paper_figures
from eval.report import main, write
from eval.report_data import KNOWN, load
from eval.report_tables import fit_table, paper_tables, score_table, signature_table
from eval.study.expressions import EXPRESSIONS, FINETUNING, ORIGINAL
from eval.tables import MISSING, Span
from minillama.errors import exit_code


@pytest.fixture
def study(tmp_path):
    return load(made_study(tmp_path))


def text_of(cell):
    parts = cell if isinstance(cell, tuple) else (cell,)
    return "".join(part if isinstance(part, str) else part.text for part in parts)


def cells(row):
    return [text_of(cell) for cell in row.values()]


def table_3(study):
    return next((table for table in paper_tables(study) if table.name == "table3"), None)


def by_label(table, labels=2):
    """{(first cells): {head of a column: text}}"""
    rows = [[text_of(row[head]) for head in table.heads] for row in table.rows]
    return {tuple(row[:labels]): dict(zip(table.heads[labels:], row[labels:])) for row in rows}


def test_table_6_has_the_paper_s_24_rows_and_96_figures_and_ours_beside_them(study):
    table = by_label(paper_tables(study)[-1])
    ours = {label: row for label, row in table.items() if not label[1].startswith("fitted")}
    assert len(ours) == 24
    assert len(table) == 24 + 2  # a fitted row of each large model
    for name, paper in paper_figures()["rows"].items():
        model, suffix = name.split(".")
        expression = KNOWN[suffix]
        row = ours[model, expression.combine if suffix in EXPRESSIONS else expression.method]
        for direction in study.directions:
            bleu = study.rows[name]["cells"][direction]["metrics"][0]["score"]
            assert row[f"{direction} ours"].rstrip("†‡") == f"{bleu:.2f}"
            assert row[f"{direction} paper"] == f"{paper['bleu'][direction]:.2f}"
            difference = bleu - paper["bleu"][direction]
            assert float(row[f"{direction} difference"].replace("−", "-")) == pytest.approx(difference, abs=0.00501)


def test_the_paper_s_figures_are_those_of_its_tables():
    rows = paper_figures()["rows"]
    assert sum(len(row["bleu"]) for row in rows.values()) == 96
    assert sum(len(row.get("bertscore", {})) for row in rows.values()) == 40
    assert sum(4 in row["tables"] for row in rows.values()) == 8
    assert rows["8B.collab"]["bleu"] == {"ja-en": 28.09, "en-ja": 7.96, "de-en": 39.18, "en-de": 31.78}
    for name, row in rows.items():
        model, suffix = name.split(".")
        numbers = (2, 6) if model == "8B" else (2, 4, 6)
        assert row["tables"] == [number for number in KNOWN[suffix].tables if number in numbers], name
    assert KNOWN["original"] is ORIGINAL
    assert KNOWN["finetuning"] is FINETUNING


def test_tables_2_and_4_are_arranged_as_the_paper_s(study):
    table_2, _, table_4, _ = paper_tables(study)
    labels = [tuple(cells(row)[:2]) for row in table_2.rows]
    methods = ["Original", "Fine-tuning", "Proxy-tuning", "Collab-MT", "fitted: likelihood"]
    larges = [(large, name) for large in ("3B", "8B") for name in methods]
    assert labels == [("1B", "Original"), ("1B", "Fine-tuning"), *larges]
    assert "/0.9" in cells(table_2.rows[0])[2]  # BLEU/BERTScore in one cell
    assert {cells(row)[0] for row in table_4.rows} == {"1B", "3B"}
    assert len(table_4.rows) == 8 + 1


def test_p_values_mark_a_row_and_stand_in_full(study):
    row = by_label(score_table(study, "ja-en"))["3B", "L + S_srcMT + S_tgtMT"]
    assert (row["BLEU 13a p Proxy"], row["BLEU 13a p L"], row["chrF2 p Proxy"], row["chrF2 p L"]) == (
        "0.001",
        "0.300",
        "0.200",
        "0.010",
    )
    marked = by_label(paper_tables(study)[-1])["3B", "L + S_srcMT + S_tgtMT"]["ja-en ours"]
    assert marked.endswith("†")


def test_both_tokenizers_chrf_and_bertscore_stand_beside_each_other(study):
    for head in ("BLEU 13a score", "BLEU ja-mecab score", "chrF2 score", "BERTScore F1 score", "BERTScore F1 paper"):
        assert head in score_table(study, "en-ja").heads
    assert "BLEU ja-mecab score" not in score_table(study, "ja-en").heads
    for table in (paper_tables(study)[0], *paper_tables(study)[2:]):
        assert "en-ja BLEU ja-mecab" in table.heads
        assert "ja-en BLEU ja-mecab" not in table.heads
    signatures = [cells(row)[1] for row in signature_table(study).rows]
    assert Counter(signatures).most_common(1)[0][1] == 1


def test_fits_have_errors_and_a_certificate(study):
    fits = by_label(fit_table(study), 3)
    row = fits["3B", "ja-en", "likelihood"]
    assert row["weights L"] == "0.340 ± 0.011"
    assert (row["nats per token"], row["gradient norm"], row["least eigenvalue"]) == ("2.183", "1.5e-09", "3.1e-02")
    assert fits["3B", "ja-en", "likelihood, all five"]["weights S_srcMT"] == MISSING
    assert by_label(score_table(study, "ja-en"))["3B", "L + S_srcMT + S_tgtMT"]["nats per token"] == "2.500"


def test_no_row_is_the_best_where_all_are_printed_alike(tmp_path):
    path = made_study(tmp_path, ("ja-en",), ("3B",), compare=False)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        row["cells"]["ja-en"]["metrics"][0]["score"] = 0.001 if row["large"] == "1B" else 5.0
    data["rows"][3]["cells"]["ja-en"]["metrics"][0]["score"] = 6.001
    data["rows"][4]["cells"]["ja-en"]["metrics"][0]["score"] = 6.002
    path.write_text(json.dumps(data))
    strong = [
        cells(row)[1]
        for row in paper_tables(load(path))[-1].rows
        if any(isinstance(part, Span) and part.kind == "strong" for part in list(row.values())[2])
    ]
    assert strong == ["Fine-tuning", "L + (S_MT - S_all)"]  # a tie in the second model's rows, none in the first's


def test_a_study_that_is_not_the_paper_s_has_its_own_names_and_dashes_for_what_it_lacks(tmp_path):
    study = load(made_study(tmp_path, ("ja-en",), ("tiny 0.7M",), compare=False, missing=("tiny 0.7M.finetuning",)))
    table = by_label(paper_tables(study)[-1])
    assert table["tiny 0.7M", "Fine-tuning"] == {"ja-en BLEU": MISSING}


def test_a_study_without_texts_or_fits_still_has_its_tables(tmp_path):
    path = made_study(tmp_path, ("de-en",), ("3B",), texts=False)
    data = json.loads(path.read_text()) | {"fits": {}}
    for row in data["rows"]:
        row["cells"]["de-en"] |= {"metrics": row["cells"]["de-en"]["metrics"][:1], "p": {}, "nats_per_token": None}
    path.write_text(json.dumps(data))
    [markdown] = write(path, tmp_path / "report", ["md"])[:1]
    titles = ["Table 2", "Table 6", "de-en: every row and measure", "Signatures"]
    assert re.findall(r"^\*\*(.*?)(?:: [A-Zw].*)?\*\*$", markdown.read_text(), re.MULTILINE) == titles


def test_the_paper_s_sentence_is_found_by_its_reference(study):
    table = table_3(study)
    rows = {cells(row)[0]: cells(row)[1:] for row in table.rows}
    assert "8頭の競走馬" in rows["source"][0]
    assert rows["3B Proxy-tuning"][1].startswith("breaks off")
    path = study.folder / study.data["directions"]["ja-en"]["reference_file"]
    path.write_text("no horse\n" * 4)
    assert table_3(study) is None


def test_the_report_is_markdown_latex_and_a_plot_that_both_show(tmp_path):
    files = write(made_study(tmp_path), tmp_path / "report")
    names = [path.relative_to(tmp_path / "report").as_posix() for path in files]
    assert names == ["report.md", "report.tex", "plots/bleu-by-expression.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    for path in files[:2]:
        assert "plots/bleu-by-expression.png" in path.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<b>", files[0].read_text(encoding="utf-8"))  # a model's text is never markup


def test_without_matplotlib_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    def missing(study):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(report, "bleu_by_expression", missing)
    files = write(made_study(tmp_path), tmp_path / "report", ["md"])
    assert [path.name for path in files] == ["report.md"]
    assert "pip install 'collab-mt[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], "no such file|No such file"),
        ("{", [], "no JSON"),
        ("[]", [], "no JSON object"),
        ('{"rows": []}', [], "no 'commit'; expected the results.json of eval.paper"),
        ("", ["--format", "pdf"], "unknown format 'pdf'"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(tmp_path, capsys, content, arguments, expected):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    code = exit_code(lambda: main([str(path), "--output", str(tmp_path / "report"), *arguments]))
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(expected, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()
