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


@dataclass(frozen=True)
class Options:
    """How sentences are read and decoded. Languages are codes such as `ja`. `nbest` 0: no list is requested.

    One beam without `sample` is greedy decoding; see SamplingParams for the numbers. explain: record why each token was
    chosen. Raises InputError for numbers out of range and for options that exclude one another or have no effect; the
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
        drafts = self.speculate in ("off", "auto") or self.speculate in map(str, range(1, MAX_DRAFT + 1))
        # Written so that NaN is refused.
        for valid, message in (
            (self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1"),
            (self.max_new_tokens >= 1, f"--max-new-tokens {self.max_new_tokens}: must be at least 1"),
            (1 <= self.beam <= MAX_BEAMS, f"--beam {self.beam}: expected 1 to {MAX_BEAMS}"),
            (abs(self.length_penalty) <= 10, f"--length-penalty {self.length_penalty:g}: expected -10 to 10"),
            (
                0 <= self.nbest <= self.beam,
                f"--nbest {self.nbest}: --beam {self.beam} gives 1 to {self.beam} hypotheses",
            ),
            (0 < self.temperature <= 1e6, f"--temperature {self.temperature:g}: expected above 0, up to a million"),
            (self.top_k >= 0, f"--top-k {self.top_k}: expected 0 or more"),
            (0 < self.top_p <= 1, f"--top-p {self.top_p:g}: expected above 0, up to 1"),
            (0 <= self.seed <= MAX_SEED, f"--seed {self.seed}: expected 0 to {MAX_SEED}"),
            (drafts, f"--speculate {self.speculate}: expected auto, off, or 1 to {MAX_DRAFT} tokens"),
            (not self.sample or self.beam == 1, "--sample and --beam exclude one another; give one of them"),
            (
                self.speculate == "off" or self.beam == 1,
                "--speculate and --beam exclude one another; give one of them",
            ),
        ):
            if not valid:
                raise InputError(message)
        if not self.sample:
            self._check_unused("--sample", "temperature", "top_k", "top_p", "seed")
        if self.beam == 1 and not self.nbest:
            self._check_unused("--beam", "length_penalty")

    def _check_unused(self, option: str, *names: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"--{name.replace('_', '-')} has no effect without {option}; give {option} too")

    @property
    def sampling_params(self) -> SamplingParams:
        """The same for the engine, whose temperature 0 is greedy decoding."""
        return SamplingParams(
            temperature=self.temperature if self.sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            beams=self.beam,
            length_penalty=self.length_penalty,
            nbest=self.nbest,
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
