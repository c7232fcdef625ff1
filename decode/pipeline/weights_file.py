"""Weights in a TOML file: what decode.tune writes and `--weights` reads instead of `--combine`."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from corpora.text import read_bytes
from decode.engine.expression import parse, weight_fault
from minillama.errors import InputError
from minillama.files import atomic_write


def combination(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """One nonzero weight for each model in use: from `--combine`, `--weights`, or the plain sum.

    Raises InputError for both options at once, and for names that are not those of `names`.
    """
    if arguments.weights is None:
        return parse(" + ".join(names) if arguments.combine is None else arguments.combine, names)
    if arguments.combine is not None:
        raise InputError("--combine and --weights exclude one another; give one of them")
    return read_weights(arguments.weights, names)


def read_weights(path: str, names: Sequence[str]) -> dict[str, float]:
    """Weights by name in the order of `names`, without zeros. A model of weight zero need not be among the names."""
    try:
        content = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error}), expected a file that decode.tune wrote") from None
    table = content.get("weights")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: no table [weights], expected lines such as L = 0.5 under it")
    for name, weight in table.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError(f"{path}: the weight of {name} is {weight!r}, expected a number")
        if weight and (fault := weight_fault(name, float(weight))):
            raise InputError(f"{path}: {fault}")
    listed = f"the weights are of {', '.join(table)}, the models are {', '.join(names)}"
    if missing := [name for name, weight in table.items() if weight and name not in names]:
        raise InputError(f"{path}: no --model for {', '.join(missing)}; {listed}")
    if unknown := [name for name in names if name not in table]:
        raise InputError(f"{path}: no weight for {', '.join(unknown)}; {listed}")
    if not any(table.values()):
        raise InputError(f"{path}: every weight is zero; at least one model must have another")
    return {name: float(table[name]) for name in names if table[name]}


def write_weights(path: str, report: Mapping[str, Any]) -> None:
    """Write a report of decode.tune atomically. Entries of None are left out; of `against` only the nats are kept."""
    content = _without_none({**report, "against": {row["expression"]: row["nats"] for row in report["against"]}})
    text = f"# Written by decode.tune; decode.collab --weights reads it.\n{tomli_w.dumps(content)}"
    try:
        atomic_write(Path(path), text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }
