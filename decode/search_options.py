"""The options that say how translations are looked for: greedily, by beam search or by sampling."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from decode.engine.beam import MOST_BEAMS
from minillama import InputError

LARGEST_SEED = 2**63 - 1
TOO_SURE = "A plain sum of logits is far too sure of its choice, weights fitted by decode.tune are not: docs/tuning.md"


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """One beam without `sample` is greedy decoding. `nbest` 0: no list is asked for. See kernels.Sampling for the rest.

    Raises InputError for numbers out of range and for options that exclude one another or have no effect.
    """

    beam: int = 1
    length_penalty: float = 1.0
    nbest: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.beam <= MOST_BEAMS:
            raise InputError(f"--beam {self.beam}: 1 to {MOST_BEAMS} beams can be searched")
        if not abs(self.length_penalty) <= 10:  # false for NaN
            raise InputError(f"--length-penalty {self.length_penalty:g}: expected a number between -10 and 10")
        if not 0 <= self.nbest <= self.beam:
            raise InputError(f"--nbest {self.nbest}: --beam {self.beam} gives 1 to {self.beam} hypotheses")
        if self.sample and self.beam > 1:
            raise InputError("--sample and --beam exclude one another; give one of them")
        if not 0 < self.temperature <= 1e6:
            raise InputError(f"--temperature {self.temperature:g}: expected a number above 0 and up to a million")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(f"--top-k {self.top_k} --top-p {self.top_p:g}: expected 0 or more, and above 0 up to 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"--seed {self.seed}: expected 0 to {LARGEST_SEED}")
        self._refuse(not self.sample, ("temperature", "top_k", "top_p", "seed"), "--sample")
        self._refuse(self.beam == 1 and not self.nbest, ("length_penalty",), "--beam")

    def _refuse(self, without: bool, names: tuple[str, ...], option: str) -> None:
        defaults = {field.name: field.default for field in fields(SearchOptions)}
        changed = [name for name in names if getattr(self, name) != defaults[name]]
        if without and changed:
            raise InputError(f"--{changed[0].replace('_', '-')} has no effect without {option}; give {option} too")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    beams = parser.add_argument_group("beam search", TOO_SURE)
    beams.add_argument(
        "--beam", type=int, default=1, metavar="K", help=f"hypotheses kept, 1 to {MOST_BEAMS} (default 1: greedy)"
    )
    beams.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="A",
        help="a hypothesis scores its log-probability over its length to this power, its end counted (default 1)",
    )
    beams.add_argument("--nbest", type=int, default=0, metavar="N", help="list the N best of each sentence, N <= K")
    beams.add_argument(
        "--nbest-output",
        metavar="FILE",
        help="where to: lines of `line ||| text ||| F0= log-probability ||| score`, lines counted from 0, as Moses and "
        "Marian write them (default OUTPUT.nbest)",
    )
    draws = parser.add_argument_group("sampling", TOO_SURE)
    draws.add_argument("--sample", action="store_true", help="draw each token instead of taking the best")
    draws.add_argument("--temperature", type=float, default=1.0, metavar="T", help="logits are divided by it (1)")
    draws.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K best tokens (default: all)")
    draws.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the best tokens that have mass P (default 1)"
    )
    draws.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed draws the same for a line (default 0)"
    )


def nbest_path(arguments: argparse.Namespace) -> str | None:
    """The file for n-best lists, None if none are asked for; whether it can be written is not looked at."""
    if not arguments.nbest:
        if arguments.nbest_output:
            raise InputError("--nbest-output has no effect without --nbest; give --nbest too")
        return None
    if arguments.nbest_output == "-":
        raise InputError("--nbest-output -: give a file; standard output is for translations")
    if arguments.nbest_output:
        return str(arguments.nbest_output)
    if arguments.output == "-" or (Path(arguments.output).exists() and not Path(arguments.output).is_file()):
        raise InputError("--nbest: with translations on standard output, name a file for the lists by --nbest-output")
    return f"{arguments.output}.nbest"
