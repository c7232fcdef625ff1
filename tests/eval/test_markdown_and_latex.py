"""Both writings of one table: every cell is read back as it was by another program's parser."""

import re
import shutil
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made_study import made_study
from markdown_it import MarkdownIt

from eval.report import render, write
from eval.report_data import load
from eval.tables import LATEX_PACKAGES, Column, Latex, Markdown, Span, Table, code, number

TEXT = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" |\\`*_<>[]()#&~$%^{}'\"-"), max_size=30)
READER = MarkdownIt("commonmark").enable("table")


def one_table(cells):
    columns = [Column(f"c{index}", "number" if index % 2 else "text", "group") for index in range(len(cells))]
    row = dict(zip(columns, cells))
    return Table("t", "Title", [[row], [row]])


def markdown_cells(text):
    """Cells as markdown-it reads them: the plain text of each."""
    cells, inside = [], False
    for token in READER.parse(text):
        inside = (inside or token.type in ("td_open", "th_open")) and token.type not in ("td_close", "th_close")
        if inside and token.type == "inline":
            cells.append("".join(child.content for child in token.children))
    return cells


@given(st.lists(TEXT, min_size=1, max_size=4))
@example(["__0__"])
def test_markdown_gives_every_cell_back(cells):
    read = markdown_cells(Markdown().table(one_table(cells)))
    assert [cell.split() for cell in read[len(cells) :]] == [cell.split() for cell in cells * 2]


@given(TEXT.filter(lambda text: "`" not in text and text.strip()))
def test_markdown_gives_code_back(text):
    read = markdown_cells(Markdown().table(one_table([code(text)])))
    assert read[1].split() == text.split()


@given(st.text(max_size=40))
def test_latex_leaves_no_character_with_a_meaning(text):
    escaped = Latex().escape(text)
    plain = re.sub(r"\\[#$%&_{}\-]", "", escaped)
    assert not re.search(r"[#$%&_^~`\"|<>]", re.sub(r"\\(?:[a-zA-Z]+)", "", plain))
    assert plain.count("{") == plain.count("}")


def test_a_row_of_latex_has_as_many_cells_as_columns(tmp_path):
    text = render(load(made_study(tmp_path)), Latex(), [])
    for body in re.findall(r"\\begin\{tabular\}\{(.*?)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        columns = len(re.sub(r"p\{[^}]*\}", "p", body[0]))
        for line in body[1].splitlines():
            if line.endswith(r"\\"):
                spans = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line))
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == columns, line
    for name in ("table", "figure", "tabular", "adjustbox"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}")
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule(lr){3-5}"))


def test_tables_of_the_report_have_equal_rows_in_markdown(tmp_path):
    text = render(load(made_study(tmp_path)), Markdown(), [])
    rows = {}
    for token in READER.parse(text):
        if token.type == "table_open":
            rows = {}
        elif token.type == "tr_open":
            rows[len(rows)] = 0
        elif token.type in ("td_open", "th_open"):
            rows[len(rows) - 1] += 1
        elif token.type == "table_close":
            assert len(set(rows.values())) == 1
    assert READER.render(text).count("<table>") == len(re.findall(r"^\|---", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("xelatex") is None, reason="needs xelatex with adjustbox (texlive-latex-extra)")
def test_the_latex_compiles(tmp_path):
    write(made_study(tmp_path), tmp_path / "report", ["tex"])
    document = rf"\documentclass{{article}}{LATEX_PACKAGES}\begin{{document}}\input{{report.tex}}\end{{document}}"
    (tmp_path / "report" / "document.tex").write_text(document)
    command = ["xelatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    done = subprocess.run(command, cwd=tmp_path / "report", capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("value", "decimals", "signed", "expected"),
    [
        (None, 2, False, "–"),
        (-0.004, 2, True, "0.00"),
        (-1.5, 2, True, "−1.50"),
        (1234.5, 1, False, "1,234.5"),
        (3, 0, True, "+3"),
    ],
)
def test_a_number_is_printed_with_a_true_minus_and_no_sign_on_nothing(value, decimals, signed, expected):
    assert number(value, decimals, signed) == expected


def test_a_table_with_an_uneven_row_is_refused():
    one, two = Column("a"), Column("b")
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table("t", "", [[{one: "x", two: "y"}, {one: "x"}]])


def test_columns_without_a_value_are_left_out():
    table = Table("t", "", [[{Column("a"): "1", Column("b"): "–"}], [{Column("a"): "–", Column("b"): "–"}]])
    assert [column.label for column in table.without_empty_columns().columns] == ["a"]


def test_spaces_around_code_are_kept():
    assert Markdown().text(("Again: ", Span("x", "code"), " here.")) == "Again: `x` here."
