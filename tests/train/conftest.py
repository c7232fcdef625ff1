"""Files that the tests of commands train on."""

import pytest

from corpora import sample


@pytest.fixture
def pairs_tsv(tmp_path):
    """A folder with train.tsv (32 pairs) and valid.tsv (8) of the built-in sample."""
    pairs = sample()
    lines = [f"{source}\t{target}\n" for source, target in zip(pairs.source, pairs.target)]
    (tmp_path / "train.tsv").write_text("".join(lines[:32]), encoding="utf-8")
    (tmp_path / "valid.tsv").write_text("".join(lines[32:]), encoding="utf-8")
    return tmp_path
