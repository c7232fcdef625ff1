"""The combination expression: `L + 0.5*S_src + 0.5*S_tgt`, `L + (S_mt - S_base)` -> one weight per model.

It is read by Python's own parser; only names, decimal numbers, `+ - *` and parentheses that form a linear function of
the models are accepted. A value is a linear form: a weight for every name, and a number under the key "".
"""

import ast
from collections.abc import Collection

from minillama import InputError

Linear = dict[str, float]
NUMBER = ""
# Normal float32 numbers: logits are summed in float32.
SMALLEST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127
MAX_LENGTH = 4096
SIGNS = {ast.Add: 1.0, ast.UAdd: 1.0, ast.Sub: -1.0, ast.USub: -1.0}


def parse(expression: str, known: Collection[str], all_used: bool = True) -> dict[str, float]:
    """Weights by name, in order of first mention; a name whose weights cancel to zero is left out.

    Raises InputError for a name that is not known, with `all_used` for a known one that is not used, and for anything
    that is not linear.
    """

    def error(reason: str, column: int | None = None) -> InputError:
        where = "" if column is None else f" at column {column}"
        return InputError(f"expression {expression[:80]!r}{where}: {reason}")

    def linear(node: ast.expr) -> Linear:
        column = len(expression.encode()[: node.col_offset].decode(errors="ignore")) + 1
        match node:
            case ast.Constant(value=float() | int() as value) if not isinstance(value, bool):
                return {NUMBER: float(value) if abs(value) < LARGEST else float("inf")}
            case ast.Name(id=name):
                if name not in known:
                    raise error(f"{name} is unknown; the models are {', '.join(known)}", column)
                return {name: 1.0}
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                return {name: SIGNS[type(sign)] * weight for name, weight in linear(operand).items()}
            case ast.BinOp(left=first, op=ast.Add() | ast.Sub() as sign, right=second):
                left, right = linear(first), linear(second)
                return {n: left.get(n, 0.0) + SIGNS[type(sign)] * right.get(n, 0.0) for n in {**left, **right}}
            case ast.BinOp(left=first, op=ast.Mult(), right=second):
                left, right = linear(first), linear(second)
                names = [" and ".join(name for name in form if name != NUMBER) for form in (left, right)]
                if all(names):
                    raise error(f"{names[0]} is multiplied by {names[1]}; a model can only be multiplied by a number")
                form, factor = (left, right) if names[0] else (right, left)
                return {name: weight * factor.get(NUMBER, 0.0) for name, weight in form.items()}
            case ast.BinOp(op=ast.Div()):
                raise error("there is no division; write a factor, 0.5*S instead of S/2", column)
        raise error("expected models, decimal numbers, '+', '-', '*' and parentheses", column)

    if len(expression) > MAX_LENGTH:
        raise error(f"longer than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        form = linear(tree.body)
    except SyntaxError as fault:
        raise error(
            f"{fault.msg}; expected models, numbers, '+', '-', '*' and parentheses", fault.offset or None
        ) from None
    except (RecursionError, MemoryError):
        raise error("nested too deeply") from None
    if form.get(NUMBER, 0.0):
        raise error(f"the number {form[NUMBER]:g} stands alone; a number can only multiply a model")
    form.pop(NUMBER, None)
    unused = [name for name in known if name not in form]
    if unused and all_used:
        raise error(f"{', '.join(unused)} is given as a model but not used; use it or leave it out")
    weights = {name: weight for name, weight in form.items() if weight}
    if not weights:
        raise error("every weight is zero; at least one model must count")
    for name, weight in weights.items():
        if wrong := weight_fault(name, weight):
            raise error(wrong)
    return weights


def weight_fault(name: str, weight: float) -> str:
    """What is wrong with a weight that is not zero; empty where nothing is."""
    if SMALLEST <= abs(weight) <= LARGEST:  # false for NaN
        return ""
    return f"the weight of {name} is {weight:g}, beyond float32's range"


def format_weights(weights: dict[str, float]) -> str:
    """The expression of the weights, shortest digits that read back exactly: `L + 0.5*S`."""
    terms: list[str] = []
    for name, weight in weights.items():
        size = abs(weight)
        term = name if size == 1 else f"{size!r}*{name}"
        sign = "-" if weight < 0 else "+"
        terms.append(f" {sign} {term}" if terms else f"-{term}" if weight < 0 else term)
    return "".join(terms)
