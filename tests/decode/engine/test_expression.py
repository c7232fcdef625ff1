"""Expressions: their weights are those of arithmetic, and what is not a weighted sum is refused by name."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.engine.expression import format_weights, parse
from minillama import InputError

NAMES = ["L", "S_src", "S_tgt", "S_1"]
numbers = st.sampled_from(["0.5", "2", "1.25", ".75", "3", "1e-1"])


@st.composite
def linear(draw, depth=3):
    """Source text of a linear form over NAMES."""
    if depth == 0:
        return draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(["name", "sum", "difference", "times", "minus", "parentheses"]))
    if kind == "name":
        return draw(st.sampled_from(NAMES))
    inner = draw(linear(depth - 1))
    if kind == "times":
        number = draw(numbers)
        return draw(st.sampled_from([f"{number}*({inner})", f"({inner}) * {number}", f"{number}*2*({inner})"]))
    if kind == "minus":
        return f"-({inner})"
    if kind == "parentheses":
        return f"( {inner} )"
    return f"{inner} {'+' if kind == 'sum' else '-'} ({draw(linear(depth - 1))})"


def value_in_python(expression: str, name: str) -> float:
    """The weight of `name`: Python's own value of the expression with that name 1 and the others 0."""
    return eval(compile(ast.parse(expression, mode="eval"), "", "eval"), {n: float(n == name) for n in NAMES})


@given(linear())
def test_weights_are_those_of_python_arithmetic(expression):
    names = {node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)}
    used = [name for name in NAMES if name in names]
    expected = {name: value_in_python(expression, name) for name in used}
    if not any(expected.values()):
        with pytest.raises(InputError, match="every weight is zero"):
            parse(expression, used)
        return
    found = parse(expression, used)
    assert {name: found.get(name, 0.0) for name in used} == pytest.approx(expected)
    assert all(found.values())


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-30), min_size=1))
def test_formatted_weights_read_back_to_the_same_weights(weights):
    assert parse(format_weights(weights), list(weights)) == weights


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("L + S_x", "at column 5: S_x is unknown; the models are L, S"),
        ("L", "S is given as a model but not used"),
        ("L + S/2", "there is no division; write a factor, 0.5*S instead of S/2"),
        ("(L + S", "at column 1: '(' was never closed"),
        ("L + S)", "at column 6: unmatched ')'"),
        ("L * S", "L is multiplied by S"),
        ("L + S + 1", "the number 1 stands alone"),
        ("0*L + 0*S", "every weight is zero"),
        ("L S", "at column 3: invalid syntax"),
        ("2L + S", "at column 1: invalid decimal literal"),
        ("", "invalid syntax"),
        ("L ** S", "expected models, decimal numbers"),
        ("L + True*S", "expected models, decimal numbers"),
        ("L + 1e999*S", "the weight of S is inf, beyond float32's range"),
        ("(" * 1000 + "L" + ")" * 1000, "too many nested parentheses"),
        ("-" * 4000 + "L + S", "nested too deeply"),
        ("L + " * 2000 + "S", "longer than 4096 characters"),
    ],
)
def test_what_is_not_a_weighted_sum_is_refused_with_its_column(expression, message):
    with pytest.raises(InputError) as error:
        parse(expression, ["L", "S"])
    assert message in str(error.value)
    assert repr(expression[:80]) in str(error.value)


def test_a_model_may_appear_twice_and_one_that_cancels_is_left_out():
    assert parse("L + S_1 + 0.5*L - S_1", ["L", "S_1"]) == {"L": 1.5}
