"""Every measured figure of README.md and docs/ stands in the run file that is named for it; and what that takes."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import paper
from eval.docs import PAGE, build, first_difference
from eval.docs_tables import KINDS
from eval.figures import ROOT, Figure, check, figures, main, pages, values
from eval.pages import Block
from minillama.errors import InputError, exit_code

RUN = {
    "seconds": 5400,
    "share": 0.0543,
    "rows": [{"batch": 1, "system": "ours", "speed": 12.345}, {"batch": 4, "system": "theirs", "speed": 4096}],
    "note": "peak 1,536 MB",
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "loop.py").write_text("SPIKE = 4.0\nOTHER = 7.5\n")
    return tmp_path


def faults(root, text):
    page = root / "page.md"
    page.write_text(text)
    return check(page, root)


def test_every_figure_of_the_readme_and_the_docs_is_traced():
    found = [fault for page in pages() for fault in check(page)]
    assert not found, "\n".join(found)


def test_the_page_of_results_is_what_the_run_files_give():
    line = first_difference((ROOT / PAGE).read_text(encoding="utf-8"), build())
    assert line is None, f"{PAGE}:{line} differs: run python -m eval.docs"


def test_the_committed_plan_of_the_paper_s_study_is_what_the_command_prints(tmp_path, capsys):
    committed = (ROOT / "eval" / "results" / "paper-plan.txt").read_text(encoding="utf-8")
    paper.main([str(ROOT / "eval" / "paper.toml"), "--dry-run", "--work", str(tmp_path / "work")])
    hours = [text[text.index("\non ") :].strip() for text in (committed, capsys.readouterr().out)]
    assert hours[0] == hours[1], "run python -m eval.paper eval/paper.toml --dry-run again"


@pytest.mark.parametrize("line", ["12.3 tokens/s", "12.35", "5.4%", "5.43 %", "1.5 hours", "90 min", "1.5 GB"])
def test_a_figure_of_the_run_is_found_at_its_digits_and_unit(root, line):
    assert faults(root, f"<!-- figures: run.json -->\nIt is {line} here.\n") == []


@pytest.mark.parametrize("line", ["12.4 tokens/s", "12.33", "5.5%", "1.6 hours", "0.055", "13 ms"])
def test_a_figure_that_differs_from_the_run_fails_by_name(root, line):
    (fault,) = faults(root, f"<!-- figures: run.json -->\nIt is {line} here.\n")
    assert fault == f"page.md:2: {line.split()[0].rstrip('%')} is not in run.json"


@settings(deadline=None)
@given(st.floats(1e-4, 1e6), st.integers(0, 4))
def test_printing_is_rounding(value, decimals):
    printed = f"{value:,.{decimals}f}"
    assert Figure(printed, 1, ()).equals(value)
    off = value + math.copysign(1.01 * 10.0**-decimals, value)
    assert not Figure(f"{off:.{decimals}f}", 1, ()).equals(value)


@settings(deadline=None)
@given(st.floats(1e-12, 1e-3))
def test_exponents_too(value):
    assert Figure(f"{value:.1e}", 1, ()).equals(value)
    assert not Figure(f"{value * 1.2:.1e}", 1, ()).equals(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24.72 BLEU of 500 sentences", ["24.72"]),
        ("81 minutes, 110 MB, 27.4MB, 2.2x, 3 × 4", ["81", "110", "27.4", "2.2"]),
        ("p = 0.003, −0.26, 1e-6, (0.02%)", ["0.003", "0.26", "1e-6", "0.02"]),
        ("1,024 tokens/s with B = 16 and 1,000 resamples", ["1,024"]),
        ("Python 3.11, torch ≥ 2.11, triton 3.6, version 2.6.0, Llama-3.2-1B, CC BY 2.0, Apache-2.0", []),
        ("`--top-p 0.95 --lr 1e-4` and `0.5*S` but `peak 0.84 GiB`", ["0.84"]),
        ("[a link](page-1.5.md) to https://example.org/2.5", []),
        ("| a |\n|---|\n| 12.5 |", ["12.5"]),
        ("| tokens/s | rows |\n|---|---|\n| **1,234** | 16 |\n| 7 of 9 | 3 |", ["1,234"]),
        ("    python -m x --lr 0.1     # 25 sentences\n    peak  0.84 GiB, BLEU 24.7", ["0.84", "24.7"]),
    ],
)
def test_what_is_a_figure(text, expected):
    kind = "table" if text.startswith("|") else "code" if text.startswith("    ") else "text"
    block = Block(kind, list(enumerate(text.split("\n"), 1)))
    assert [figure.text for figure in figures(block)] == expected


def test_a_part_of_a_run_holds_that_part_alone(root):
    assert values(root, "run.json#rows/batch=1&system=ours/speed") == (12.345,)
    assert values(root, "run.json#rows/1") == (4, 4096)
    assert values(root, "loop.py#SPIKE") == (4.0,)
    assert values(root, "*.json#note") == (1536,)
    missing = {"gone.json": "no such file", "run.json#rows/batch=2": "no number", "loop.py#X": "no number"}
    for source, expected in missing.items():
        with pytest.raises(InputError, match=expected):
            values(root, source)


def test_a_comment_holds_for_the_block_below_it_or_to_the_next_heading(root):
    comment = "<!-- figures: run.json#share -->\n"
    (fault,) = faults(root, f"{comment}5.4% here.\n\nAnd 5.4% there.\n")
    assert fault.startswith("page.md:4: 5.4 has no trace; expected <!-- figures: RUN FILE --> above it, or")
    assert faults(root, f"{comment}\n5.4% here.\n\nAnd 5.4% there.\n") == []
    assert len(faults(root, f"{comment}\n5.4% here.\n\n## Next\n\nAnd 5.4% there.\n")) == 1
    both = f"{comment}<!-- figures: loop.py#SPIKE,\n     run.json#seconds -->\n5.4%, 4 times, 1.5 h\n"
    assert faults(root, both) == []


def test_settings_are_exempt_one_by_one_and_none_for_nothing(root):
    assert faults(root, "<!-- settings: 2e-5, 0.5 -->\nlearning rate 2e-5, weight 0.5\n") == []
    assert faults(root, "<!-- settings: 2e-5, 0.5 -->\nlearning rate 2e-5\n") == [
        "page.md:1: exempts 0.5, which does not stand there"
    ]
    assert faults(root, "<!-- figures: run.json -->\nno figure\n") == ["page.md:1: traces no figure"]
    assert faults(root, "<!-- figures: gone.json -->\n5.4%\n") == ["page.md:1: gone.json: no such file"]


def test_a_comment_shown_as_an_example_is_none(root):
    assert faults(root, "    <!-- figures: gone.json -->\n\nWrite `<!-- figures: gone.json -->` above it.\n") == []


def test_the_command_says_what_is_wrong_and_fails(root, capsys):
    page = root / "page.md"
    page.write_text("It takes 3 s.\n")
    assert exit_code(lambda: main([str(page)])) == 1
    assert "page.md:1: 3 has no trace" in capsys.readouterr().out
    assert exit_code(lambda: main([str(root / "none.md")])) == 2


STEP = {"batch": 1, "members": 3, "system": "ours", "dtype": "float32", "context": 48, "tokens_per_second": 14.25} | {
    "ms_per_step": 70.2,
    "ratio_to_transformers": 2.71,
    "share_of_read_bandwidth": 0.912,
    "tokens_equal": False,
    "sequences": 16,
    "sequences_equal": 15,
    "ties": 1,
    "peak_memory_megabytes": 1630.0,
}
TEXT_ROW = STEP | {"sentences": 500, "combine": "L + S", "order": "continuous", "seconds": 5.25, "bleu": 24.72}
HEAD = {"date": "2026-11-24T00:00:00", "device": "a machine", "threads": 2, "versions": {"torch": "2.13.0"}}
RUNS = {
    "decode": HEAD
    | {"machine": {"read_gigabytes_per_second": 29.17, "matmul_gigaflops": {"float32": 130.5}}, "rows": [STEP]}
    | {
        "dev": [TEXT_ROW],
        "speculation": [TEXT_ROW | {"speculate": "auto", "ratio_to_plain": 1.31}],
        "notes": ["no peer"],
    },
    "train": HEAD
    | {"model": "smollm2-135m", "dtype": "float32", "loss_difference": 2.1e-6, "peak_memory_ratio": 0.512}
    | {"full_sequences": {"ours_per_second": 93.1, "theirs_per_second": 88.2, "ratio": 1.06}}
    | {"sentence_pairs": {"ours_per_second": 43.1, "theirs_per_second": 20.2, "ratio": 2.13, "steps": 7}}
    | {"large_vocabulary": {"vocabulary": 128256, "ours_bytes": 3 * 2**29, "theirs_bytes": 3 * 2**30}}
    | {"loss_curves": {"steps": 100}}
    | {"what_each_brings": [{"layout": "packed", "seconds": 1.25, "times_the_one_before": 1.5}]},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_page_built_of_a_run_traces_every_figure_to_it(tmp_path, kind):
    (tmp_path / "docs").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(RUNS[kind]))
    template = tmp_path / "docs" / "results.md.in"
    sections = f"## There\n\n{{{{ {kind} run.json }}}}\n\n## Not yet\n\n{{{{ {kind} gone*.json }}}}\n"
    template.write_text(f"# Results\n\n{sections}")
    text = build(tmp_path)
    assert "Not yet" not in text
    assert "a machine, 2 threads, 2026-11-24" in text
    (tmp_path / "page.md").write_text(text)
    assert check(tmp_path / "page.md", tmp_path) == []
    (tmp_path / "run.json").write_text(json.dumps(RUNS[kind]).replace("5", "6").replace("1.0", "1.7"))
    assert check(tmp_path / "page.md", tmp_path)
    assert first_difference(text, build(tmp_path)) is not None


def test_a_line_of_the_template_that_means_nothing_is_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    template = tmp_path / "docs" / "results.md.in"
    template.write_text("{{ graphs run.json }}\n")
    with pytest.raises(InputError, match="unknown kind 'graphs', expected one of " + ", ".join(KINDS)):
        build(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    template.write_text("{{ train run.json }}\n")
    with pytest.raises(InputError, match="not a run file of kind train"):
        build(tmp_path)
