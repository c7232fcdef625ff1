"""Files of weights: read back as written, and refused in one line where they do not fit."""

import math
import tomllib

import pytest

from decode.pipeline.weights_file import read_weights, write_weights
from minillama import InputError

EARLIER = """# Written by decode.tune; decode.collab --weights reads it.
objective = "bleu"
combine = "0.5*L - 0.25*A"

[weights]
L = 0.5
A = -0.25
B = 0.0

[fit]
bounds = [-1.0, inf]
nats = 1.7
centre = "L + A + B"

[bleu]
bleu = 28.3
signature = "nrefs:1|case:mixed"

[against]
"L + A" = 2.1
"""
GOOD = "[weights]\nA = 0.5\nB = -0.25\nC = 0\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[weights", "not TOML"),
        ("x = 1\n", r"no table \[weights\]"),
        ("[weights]\n", r"no table \[weights\]"),
        ("weights = 3\n", r"no table \[weights\]"),
        (GOOD.replace("0.5", '"0.5"'), "the weight of A is '0.5', expected a number"),
        (GOOD.replace("0.5", "true"), "the weight of A is True"),
        (GOOD.replace("0.5", "nan"), "the weight of A is nan, beyond"),
        (GOOD.replace("0.5", "1e300"), "the weight of A is 1e[+]300, beyond"),
        (GOOD + "D = 1\n", "no --model for D; the weights are of A, B, C, D, the models are A, B, C"),
        (GOOD.replace("C = 0\n", ""), "no weight for C"),
        ("[weights]\nA = 0\nB = 0\nC = 0.0\n", "every weight is zero"),
    ],
)
def test_a_file_of_weights_that_does_not_fit_is_refused_in_one_line(tmp_path, content, named):
    path = tmp_path / "w.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=named) as refused:
        read_weights(str(path), list("ABC"))
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_zero_weights_need_no_model_and_order_is_that_of_the_models(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(GOOD)
    assert list(read_weights(str(path), ["B", "A"]).items()) == [("B", -0.25), ("A", 0.5)]
    assert list(read_weights(str(path), ["C", "A", "B"]).items()) == [("A", 0.5), ("B", -0.25)]


def test_a_report_that_is_written_reads_back(tmp_path):
    path = tmp_path / "w.toml"
    weights = {"L": 0.1, "モデル": -1e-20, "whole": 3, "odd name ]": float("inf")}
    report = {
        "combine": 'quotes " and \\ and \x7f and 日本',
        "nothing": None,
        "weights": weights,
        "fit": {"list": ["a", 1, 2.5], "yes": True, "none": None, "error": float("nan")},
        "against": [{"expression": "L + S", "nats": 1.5, "gain": 0.5}, {"expression": "L", "nats": 2.0, "gain": 1.0}],
    }
    write_weights(str(path), report)
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").startswith("# Written by decode.tune")
    assert math.isnan(found["fit"].pop("error"))
    assert found == {
        "combine": report["combine"],
        "weights": weights,
        "fit": {"list": ["a", 1, 2.5], "yes": True},
        "against": {"L + S": 1.5, "L": 2.0},
    }


def test_a_file_written_by_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(EARLIER, encoding="utf-8")
    assert read_weights(str(path), ["L", "A", "B"]) == {"L": 0.5, "A": -0.25}
