"""How a run translates, checked: what the command line's options mean, without argparse. Imports no PyTorch."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields

from decode.engine.sequence import MAX_BEAMS, MAX_DRAFT, SamplingParams
from minillama.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
TOO_LONG = ("error", "truncate", "skip")
MAX_SEED = 2**63 - 1
DEFAULT_BATCH_SIZE = 128
REQUIRES = {**dict.fromkeys(("temperature", "top_k", "top_p", "seed"), "--sample"), "length_penalty": "--beam"}


@dataclass(frozen=True)
class Options:
    """How sentences are read and decoded. Languages are codes such as `ja`. `nbest` 0: no list is requested.

    One beam without `sample` is greedy decoding; see SamplingParams for the numbers. explain: record why each token was
    sampled. Raises InputError for numbers out of range and for options that exclude one another or have no effect; the
    message names the option as the command line has it.
    """

    source: str
    target: str
    _: KW_ONLY
    beam: int = 1
    length_penalty: float = 1.0
    nbest: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    batch_size: int = 16
    too_long: str = "error"
    speculate: str = "off"
    explain: bool = False

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, batch_size: int) -> "Options":
        """The options of a command line of decode.collab, with this batch size."""
        values = {field.name: getattr(arguments, field.name) for field in fields(cls)}
        return cls(**{**values, "explain": arguments.explain is not None, "batch_size": batch_size})

    def __post_init__(self) -> None:
        drafts = map(str, range(1, MAX_DRAFT + 1))
        checks = {
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "beam": (1 <= self.beam <= MAX_BEAMS, f"1 to {MAX_BEAMS}"),
            "length_penalty": (abs(self.length_penalty) <= 10, "-10 to 10"),  # false for NaN
            "nbest": (0 <= self.nbest <= self.beam, f"at most the {self.beam} of --beam"),
            "temperature": (1e-6 <= self.temperature <= 1e6, "a millionth to a million"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"),
            "seed": (0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
            "speculate": (self.speculate in ("off", "auto", *drafts), f"auto, off, or 1 to {MAX_DRAFT} tokens"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise InputError(f"{_flag(name)} {getattr(self, name)}: expected {expected}")
        if self.sample and (self.beam > 1 or self.nbest):
            raise InputError("--sample and --beam or --nbest exclude one another; give one of them")
        if self.speculate != "off" and self.beam > 1:
            raise InputError("--speculate and --beam exclude one another; give one of them")
        given = {"--sample": self.sample, "--beam": self.beam > 1 or self.nbest > 0}
        for field in fields(self):
            option = REQUIRES.get(field.name)
            if option and not given[option] and getattr(self, field.name) != field.default:
                raise InputError(f"{_flag(field.name)} has no effect without {option}; give {option} too")

    @property
    def sampling_params(self) -> SamplingParams:
        """The same for the engine, whose temperature 0 is greedy decoding."""
        temperature = self.temperature if self.sample else 0.0
        return SamplingParams(
            temperature, self.top_k, self.top_p, self.seed, self.beam, self.length_penalty, nbest=self.nbest
        )


def named_folders(models: Sequence[str]) -> dict[str, str]:
    """The folders of `--model NAME=DIR` by name; raises InputError."""
    folders: dict[str, str] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not re.fullmatch(r"[^\W\d]\w*", name):
            raise InputError(f"--model {text}: expected NAME=DIR, the name of letters, digits and underscores")
        if name in folders:
            raise InputError(f"--model {text}: {name} is given twice")
        folders[name] = folder
    return folders


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
