"""A study's file is checked key by key, and every study of ours reads."""

from pathlib import Path

import pytest

from eval.study.config import read_study
from eval.study.expressions import EXPRESSIONS
from minillama import InputError

STUDIES = Path(__file__).resolve().parents[3] / "eval"
LEAST = """
title = "t"
small = "S"
larges = ["L"]
[corpora.c]
languages = ["ja", "en"]
directions = ["ja-en"]
train = { files = "a.{language}" }
cpt = { files = "a.{language}" }
test = { files = "a.{language}" }
[models.S]
source = "s"
[models.L]
source = "l"
[fit]
fits = []
"""


@pytest.mark.parametrize("name", ["paper", "small", "smollm2", "tiny"])
def test_every_study_in_the_repository_reads(name):
    study = read_study(STUDIES / f"{name}.toml")
    assert study.larges
    assert study.directions()


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('small = "S"', 'smal = "S"', "unknown key smal; did you mean small?"),
        ('title = "t"', "title = 3", "title is 3; it must be a text in quotes"),
        ('larges = ["L"]', 'larges = ["M"]', "larges names M; known are S, L"),
        ('source = "l"', "layers = 2", "models.L needs one of source, module, first_layers_of and config"),
        ('source = "l"', 'source = "l"\nsorce = "l"', "unknown key models.L.sorce; did you mean models.L.source?"),
        (
            'directions = ["ja-en"]',
            'directions = ["de-en"]',
            "corpora.c.directions names de-en; known are ja-en, en-ja",
        ),
        ("cpt = { files", "cpt = { lines = [3, 2], files", "corpora.c.cpt.lines is [3, 2]"),
        ('test = { files = "a.{language}" }', "test = {}", "corpora.c.test needs either split or files"),
        ("fits = []", 'fits = ["likelihood"]', "corpora.c has no dev"),
        ("fits = []", 'fits = ["guess"]', "fit.fits names guess; known are likelihood, all"),
        ('title = "t"', 'title = "t"\nexpressions = ["sum"]', "expressions names sum; known are proxy"),
        ('title = "t"', 'title = "t"\nseed = true', "seed is True; it must be a whole number"),
        ('title = "t"', 'title = "t"\ntrain = 3', "train is 3; it must be a table"),
        ('title = "t"', "title =", "not TOML"),
    ],
)
def test_what_is_wrong_with_a_study_is_named(tmp_path, before, after, named):
    assert before in LEAST
    path = tmp_path / "study.toml"
    path.write_text(LEAST.replace(before, after, 1))
    with pytest.raises(InputError) as error:
        read_study(path)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_the_least_study_reads(tmp_path):
    (tmp_path / "study.toml").write_text(LEAST)
    assert read_study(tmp_path / "study.toml").directions() == {"ja-en": "c"}


def test_the_papers_expressions_name_its_models():
    assert len(EXPRESSIONS) == 9
    assert list(EXPRESSIONS["proxy-half"].weights) == ["L", "S_srcMT", "S_tgtMT", "S_all"]
    known = {"L", "S_all", "S_MT", "S_srcMT", "S_tgtMT"}
    assert all(set(expression.weights) <= known for expression in EXPRESSIONS.values())
