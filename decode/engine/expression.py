"""The combination expression: `L + 0.5*S_src + 0.5*S_tgt`, `L + (S_mt - S_base)` -> one weight per model.

    sum     = product (("+" | "-") product)*
    product = signed ("*" signed)*
    signed  = ("+" | "-")* (number | name | "(" sum ")")

A value is a linear form: a weight for every name, and a number under the key "". Only linear forms are accepted.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from minillama import InputError

Linear = dict[str, float]
NUMBER = ""
# Normal float32 numbers: logits are summed in float32.
SMALLEST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127
DEEPEST = 100
TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([^\W\d]\w*)|(\S))")


def parse(expression: str, known: Collection[str], all_used: bool = True) -> dict[str, float]:
    """Weights by name, in order of first mention; a name whose weights cancel to zero is left out.

    Raises InputError for a name that is not known, with `all_used` for a known one that is not used, and for anything
    that is not linear.
    """
    parser = _Parser(expression, known)
    form = parser.sum()
    parser.expect_end()
    if form.get(NUMBER, 0.0):
        raise parser.error(f"the number {form[NUMBER]:g} stands alone; a number can only multiply a model")
    form.pop(NUMBER, None)
    unused = [name for name in known if name not in form]
    if unused and all_used:
        raise parser.error(f"{', '.join(unused)} is given as a model but not used; use it or leave it out")
    weights = {name: weight for name, weight in form.items() if weight}
    if not weights:
        raise parser.error("every weight is zero; at least one model must count")
    for name, weight in weights.items():
        if fault := weight_fault(name, weight):
            raise parser.error(fault)
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


@dataclass(frozen=True)
class _Token:
    text: str
    column: int
    kind: str  # "number", "name", "sign" or "end"


def _tokens(expression: str) -> list[_Token]:
    tokens = []
    for match in TOKEN.finditer(expression.rstrip()):
        kind = ("number", "name", "sign")[(match.lastindex or 1) - 1]
        tokens.append(_Token(match[match.lastindex or 0], match.start(match.lastindex or 0) + 1, kind))
    return [*tokens, _Token("", len(expression.rstrip()) + 1, "end")]


class _Parser:
    def __init__(self, expression: str, known: Collection[str]) -> None:
        self.expression, self.known = expression, known
        self.tokens = _tokens(expression)
        self.at = 0
        self.depth = 0

    def error(self, reason: str, token: _Token | None = None) -> InputError:
        where = f" at column {token.column}" if token else ""
        return InputError(f"expression {self.expression!r}{where}: {reason}")

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def take(self, *texts: str) -> _Token | None:
        token = self.token
        if token.kind == "sign" and token.text in texts:
            self.at += 1
            return token
        return None

    def sum(self) -> Linear:
        form = self.product()
        while token := self.take("+", "-"):
            other = self.product()
            sign = 1.0 if token.text == "+" else -1.0
            form = {name: form.get(name, 0.0) + sign * other.get(name, 0.0) for name in {**form, **other}}
        return form

    def product(self) -> Linear:
        form = self.signed()
        while token := self.take("*"):
            form = self.times(form, self.signed(), token)
        return form

    def times(self, left: Linear, right: Linear, token: _Token) -> Linear:
        names = [" and ".join(name for name in form if name != NUMBER) for form in (left, right)]
        if names[0] and names[1]:
            raise self.error(
                f"{names[0]} is multiplied by {names[1]}; a model can only be multiplied by a number", token
            )
        form, factor = (left, right) if names[0] else (right, left)
        return {name: weight * factor.get(NUMBER, 0.0) for name, weight in form.items()}

    def signed(self) -> Linear:
        sign = 1.0
        while token := self.take("+", "-"):
            sign = sign if token.text == "+" else -sign
        return {name: sign * weight for name, weight in self.atom().items()}

    def atom(self) -> Linear:
        token = self.token
        if token.kind == "number":
            self.at += 1
            return {NUMBER: float(token.text)}
        if token.kind == "name":
            self.at += 1
            if token.text not in self.known:
                raise self.error(f"{token.text} is unknown; the models are {', '.join(self.known)}", token)
            return {token.text: 1.0}
        if self.take("("):
            self.depth += 1
            if self.depth > DEEPEST:
                raise self.error(f"parentheses are nested deeper than {DEEPEST}", token)
            form = self.sum()
            self.depth -= 1
            if not self.take(")"):
                raise self.missing_parenthesis(token)
            return form
        if token.kind == "end":
            raise self.error("it ends where a model, a number or '(' is expected", token)
        raise self.error(f"{token.text!r} stands where a model, a number or '(' is expected", token)

    def missing_parenthesis(self, opened: _Token) -> InputError:
        if self.token.kind == "end":
            return self.error("this '(' is never closed; a ')' is missing", opened)
        return self.unexpected()

    def unexpected(self) -> InputError:
        token = self.token
        if token.text == "/":
            return self.error("there is no division; write a factor, 0.5*S instead of S/2", token)
        if token.text == ")":
            return self.error("this ')' closes nothing; a '(' is missing", token)
        if token.kind in ("name", "number") or token.text == "(":
            return self.error(f"{token.text!r} follows without an operator; expected '+', '-' or '*'", token)
        return self.error(f"{token.text!r} is no operator; there are '+', '-', '*' and parentheses", token)

    def expect_end(self) -> None:
        if self.token.kind != "end":
            raise self.unexpected()
