"""The argument parser of every command: a wrong command line is an InputError of one line."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from minillama.errors import InputError


class Parser(argparse.ArgumentParser):
    """Help keeps the docstring's layout; a wrong command line raises InputError instead of printing the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            word = unknown[0].split("=")[0]
            hint = f"; did you mean {nearest(word, known)}?" if word.startswith("-") else ""
            self.error(f"unknown argument {word}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows the options)")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the member of `known` that is most similar to `word`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]
