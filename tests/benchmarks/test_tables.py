"""Every table of README.md and docs/ is what its run files give; a marker that means nothing is named."""

import json

import pytest

from benchmarks.tables import ROOT, main, write_tables
from minillama.errors import InputError

STEPS = [
    {"shape": "tiny", "members": 3, "system": "ours", "dtype": "float32", "batch": 1, "ms_per_step": 70.24}
    | {"ratio_to_transformers": 2.713},
    {"shape": "tiny", "members": 3, "system": "ours", "dtype": "float32", "batch": 4, "ms_per_step": 80.25}
    | {"ratio_to_transformers": 3.0},
    {"shape": "tiny", "members": 3, "system": "peer", "dtype": "float32", "batch": 4, "ms_per_step": 1240.75},
]
MARKED = "Before.\n\n<!-- table: decode-steps (from run.json) -->\nold\n<!-- end -->\n\nAfter.\n"
TABLE = """| models | system | B=1, ms | B=4, ms | B=1, over transformers | B=4, over transformers |
|---|---|---:|---:|---:|---:|
| 3 × tiny | ours, float32 | 70.2 | 80.2 | 2.71× | 3.00× |
| 3 × tiny | peer, float32 | – | 1,240.8 | – | – |"""


def test_the_pages_are_what_the_run_files_give():
    assert main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_the_readme_has_the_demo_s_table():
    assert "| Collab-MT | `L + S_src + S_tgt` | 24.72 |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_table_replaces_what_is_between_its_markers(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"rows": STEPS}))
    written = write_tables(MARKED, "page.md", tmp_path)
    assert written == MARKED.replace("old", TABLE)
    assert write_tables(written, "page.md", tmp_path) == written


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("decode-steps", "graphs", "page.md: a table is not between .*NAME one of demo, decode-steps"),
        ("run.json", "gone.json", "gone.json: no such file"),
        ("<!-- end -->", "", "page.md: a table is not between"),
        ("(from run.json)", "", "page.md: a table is not between"),
    ],
)
def test_a_marker_that_means_nothing_is_named(tmp_path, before, after, message):
    (tmp_path / "run.json").write_text(json.dumps({"rows": STEPS}))
    with pytest.raises(InputError, match=message):
        write_tables(MARKED.replace(before, after), "page.md", tmp_path)
