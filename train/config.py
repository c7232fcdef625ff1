"""`--config run.toml`: any option of a command, written in a file. The command line wins over it.

Keys are the options' names, with `-` or `_`. The file is turned into the words that would have been typed, so that
argparse alone knows types, choices and what is required. What it refuses becomes one line, as all bad input does.
"""

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillama.cli import Parser, nearest
from minillama.errors import InputError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `argv` over those of its --config file. Raises InputError naming a key that is not known."""
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(list(argv))[0].config
    if path is None:
        return parser.parse_args(argv)
    typed = {action.dest for action in parser._actions if _is_typed(action, argv)}
    rivals = {
        action.dest: {other.dest for other in group._group_actions}
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
    }
    words: list[str] = []
    for key, value in read(Path(path)).items():
        action = _action(parser, key, path)
        would_be = _words(action, key, value, path)
        if typed.isdisjoint(rivals.get(action.dest, {action.dest})):
            words += would_be
    return parser.parse_args([*words, *argv])


def read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not TOML ({error})") from None


def write_toml(values: dict[str, Any]) -> str:
    """TOML of strings, numbers, truth values and lists of them; None is left out. A JSON string is a TOML one."""
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _is_typed(action: argparse.Action, argv: Sequence[str]) -> bool:
    return any(word.split("=")[0] in action.option_strings for word in argv)


def _action(parser: argparse.ArgumentParser, key: str, path: str) -> argparse.Action:
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if (action := known.get(key.replace("-", "_"))) is not None:
        return action
    near = nearest(key.replace("-", "_"), known).replace("_", "-")
    raise InputError(f"--config {path}: unknown key {key!r}; did you mean {near!r}?")


def _words(action: argparse.Action, key: str, value: Any, path: str) -> list[str]:
    """What one would type for `key = value`."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        _expect(isinstance(value, bool), key, value, "true or false", path)
        return [option if value else action.option_strings[1]]
    if action.nargs == "+":
        listed = value if isinstance(value, list) else [value]
        fine = bool(listed) and all(isinstance(item, str) and not item.startswith("-") for item in listed)
        _expect(fine, key, value, "a list of names", path)
        return [option, *listed]
    kind = action.type or str
    if kind is float:
        _expect(type(value) in (int, float), key, value, "a number", path)
    elif kind is int:
        _expect(type(value) is int, key, value, "a whole number", path)
    else:
        _expect(isinstance(value, str), key, value, "a text in quotes", path)
        if value == "" and action.choices:  # the default of a choice that need not be made
            return []
    choices = list(action.choices or [value])
    _expect(value in choices, key, value, "one of " + ", ".join(map(str, choices)), path)
    return [f"{option}={value}"]


def _expect(fine: bool, key: str, value: Any, right: str, path: str) -> None:
    if not fine:
        raise InputError(f"--config {path}: {key} is {json.dumps(value, default=str)}; it must be {right}")
