"""Three renderings of one table: whatever stands in a cell is read back as it was by another program's parser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_study import made_study
from markdown_it import MarkdownIt

from eval.document import Column, Paragraph, Row, Span, Table, code, number
from eval.render import latex, markdown, markdown_inline, markdown_table, tex_escape
from eval.render_html import html_table
from eval.report import build, write
from eval.report_input import load

TEXT = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" |\\`*_<>[]()#&~$%^{}'\"-"), max_size=30)
READER = MarkdownIt("commonmark").enable("table")


def one_table(cells):
    columns = tuple(Column(f"c{place}", "number" if place % 2 else "text", "group") for place in range(len(cells)))
    return Table("t", "Title", columns, (Row(tuple(cells)), Row(tuple(cells), rule=True)))


def markdown_cells(text):
    """Cells as markdown-it reads them: the plain text of each."""
    cells, inside = [], False
    for token in READER.parse(text):
        inside = (inside or token.type in ("td_open", "th_open")) and token.type not in ("td_close", "th_close")
        if inside and token.type == "inline":
            cells.append("".join(child.content for child in token.children))
    return cells


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "td":
            self.cells.append("")
        self.inside = tag == "td" or (self.inside and tag in ("code", "span", "strong"))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(["__0__"])
def test_markdown_gives_every_cell_back(cells):
    read = markdown_cells(markdown_table(one_table(cells)))
    assert [cell.split() for cell in read[len(cells) :]] == [cell.split() for cell in cells * 2]


@settings(deadline=None)
@given(TEXT.filter(lambda text: "`" not in text and text.strip()))
def test_markdown_gives_code_back(text):
    read = markdown_cells(markdown_table(one_table([code(text)])))
    assert read[1].split() == text.split()


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_html_gives_every_cell_back(cells):
    spans = [Span(cell, "strong", "ja") if place else cell for place, cell in enumerate(cells)]
    head = html_table(one_table(spans))
    assert Cells(head[head.index("<tbody>") :]).cells == cells * 2


@settings(deadline=None)
@given(st.text(max_size=40))
def test_latex_leaves_no_character_with_a_meaning(text):
    escaped = tex_escape(text)
    plain = re.sub(r"\\[#$%&_{}\-]", "", escaped)
    assert not re.search(r"[#$%&_^~`\"|<>]", re.sub(r"\\(?:[a-zA-Z]+)", "", plain))
    assert plain.count("{") == plain.count("}")


def test_a_row_of_latex_has_as_many_cells_as_columns(tmp_path):
    text = latex(build(load(made_study(tmp_path))))
    for body in re.findall(r"\\begin\{tabular\}\{(.*?)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        columns = len(re.sub(r"p\{[^}]*\}", "p", body[0]))
        for line in body[1].splitlines():
            if line.endswith(r"\\"):
                spans = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line))
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == columns, line
    for name in ("table", "figure", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}")
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule(lr){3-5}"))


def test_tables_of_the_report_have_equal_rows_in_markdown(tmp_path):
    text = markdown(build(load(made_study(tmp_path))))
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
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs (texlive-latex-recommended)")
def test_the_latex_compiles(tmp_path):
    write(made_study(tmp_path), tmp_path / "report", ["tex"])
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
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
def test_a_figure_is_printed_with_a_true_minus_and_no_sign_on_nothing(value, decimals, signed, expected):
    assert number(value, decimals, signed) == expected


def test_a_table_with_an_uneven_row_is_refused():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table("t", "", (Column("a"), Column("b")), (Row(("x",)),))


def test_spaces_around_code_are_kept():
    assert markdown_inline(Paragraph(("Again: ", code("x"), " here.")).text) == "Again: `x` here."
