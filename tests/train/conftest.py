"""Files that the tests of commands train on."""

from contextlib import contextmanager

import pytest

from corpora import sample
from train.metrics import Reporter


@pytest.fixture
def pairs_tsv(tmp_path):
    """A folder with train.tsv (32 pairs) and valid.tsv (8) of the built-in sample."""
    pairs = sample()
    lines = [f"{source}\t{target}\n" for source, target in zip(pairs.source, pairs.target)]
    (tmp_path / "train.tsv").write_text("".join(lines[:32]), encoding="utf-8")
    (tmp_path / "valid.tsv").write_text("".join(lines[32:]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def crash(monkeypatch):
    """`with crash(step):` every run in it ends with an error after that step."""

    @contextmanager
    def crashing(at):
        def step(self, number, *rest):
            if number == at:
                raise RuntimeError("crash")

        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "step", step)
            with pytest.raises(RuntimeError, match="crash"):
                yield

    return crashing
