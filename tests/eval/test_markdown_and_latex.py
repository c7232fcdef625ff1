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
from eval.tables import LATEX_PACKAGES, Latex, Markdown, Span, Table, code, number

TEXT = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" |\\`*_<>[]()#&~$%^{}'\"-"), max_size=30)
READER = MarkdownIt("commonmark").enable("table")


def one_table(cells):
    row = {f"c{index}": cell for index, cell in enumerate(cells)}
    return Table("t", "Title", [[row], [row]], 1)


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
    text = render(load(made_study(tmp_path)), Latex(), True)
    bodies = re.findall(r"\\begin\{tabular\}\{(.*?)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL)
    assert len(bodies) == 8
    for columns, body in bodies:
        count = len(re.sub(r"p\{[^}]*\}", "p", columns))
        for line in body.splitlines():
            assert line == r"\midrule" or len(re.findall(r"(?<!\\)&", line)) + 1 == count, line
    for name in ("table", "figure", "tabular", "adjustbox"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}")


def test_tables_of_the_report_have_equal_rows_in_markdown(tmp_path):
    text = render(load(made_study(tmp_path)), Markdown(), True)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [index for index, line in enumerate(lines) if line.startswith("|---")]
    assert READER.render(text).count("<table>") == len(rules) == 8
    assert READER.render(text).count("<tr>") == len(lines) - len(rules)


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


def test_a_row_without_a_cell_is_refused():
    with pytest.raises(KeyError, match="b"):
        Markdown().table(Table("t", "", [[{"a": "x", "b": "y"}, {"a": "x"}]], 1))


def test_columns_without_a_value_are_left_out():
    assert Table("t", "", [[{"a": "1", "b": "–"}], [{"a": "–", "b": "–"}]], 1).heads == ["a"]


def test_spaces_around_code_are_kept():
    assert Markdown().text(("Again: ", Span("x", "code"), " here.")) == "Again: `x` here."
