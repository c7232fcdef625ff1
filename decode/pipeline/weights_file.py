"""Weights in a TOML file: what decode.tune writes and `--weights` reads in place of `--combine`."""

import argparse
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpora.text import read_bytes
from decode.engine.expression import parse, weight_fault
from minillama import InputError
from minillama.files import atomic_write


def combination(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """One weight, not zero, for each model that counts: of `--combine`, of `--weights`, or of the plain sum.

    Raises InputError for both options at once, and for names that are not those of `names`.
    """
    if arguments.weights is None:
        return parse(" + ".join(names) if arguments.combine is None else arguments.combine, names)
    if arguments.combine is not None:
        raise InputError("--combine and --weights exclude one another; give one of them")
    return read_weights(arguments.weights, names)


def read_weights(path: str, names: Sequence[str]) -> dict[str, float]:
    """Weights by name in the order of `names`, those of zero left out; their models need not be among the names."""
    try:
        content = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error}), expected a file that decode.tune wrote") from None
    table = content.get("weights")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: no table [weights], expected lines such as L = 0.5 under it")
    weights: dict[str, float] = {}
    for name, weight in table.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError(f"{path}: the weight of {name} is {weight!r}, expected a number")
        if weight and (fault := weight_fault(name, float(weight))):
            raise InputError(f"{path}: {fault}")
        if weight:
            weights[name] = float(weight)
    listed = f"the weights are of {', '.join(table)}, the models are {', '.join(names)}"
    if missing := [name for name in weights if name not in names]:
        raise InputError(f"{path}: no --model for {', '.join(missing)}; {listed}")
    if unknown := [name for name in names if name not in table]:
        raise InputError(f"{path}: no weight for {', '.join(unknown)}; {listed}")
    if not weights:
        raise InputError(f"{path}: every weight is zero; at least one model must count")
    return {name: weights[name] for name in names if name in weights}


def write_toml(path: str, comment: str, tables: Mapping[str, Any]) -> None:
    """Write values and one level of tables, whole or not at all. What is None is left out."""
    top = {key: value for key, value in tables.items() if not isinstance(value, Mapping)}
    lines = [f"# {comment}", *_entries(top)]
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *_entries(table)]
    try:
        atomic_write(Path(path), "\n".join(lines) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None]


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    """A JSON string is a TOML basic string but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
