"""A study's TOML file: corpora, models, how experts are trained, what is decoded and fitted, with how many processes.

Every key is a field of a dataclass below, with its default.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from itertools import permutations
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from corpora import language_name
from eval.study.expressions import EXPRESSIONS, FITTED
from minillama.cli import nearest
from minillama.errors import InputError

KINDS = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
KINDS |= {dict: "a table", list: "a list"}


@dataclass(frozen=True)
class Part:
    """Sentence pairs of one purpose: a named split such as `alt:ja-en:train`, or files with `{language}` in the name.

    lines: the first and the last line to use, counted from 1; empty: all.
    """

    split: str = ""
    files: str = ""
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """The text of one language pair, by purpose.

    base and general: pre-training text and pairs of the models that are made here.   train: pairs for experts.
    cpt: each expert reads one side of it.   valid: for the loss while training.   dev: weights are fitted on it.
    """

    languages: list[str]
    directions: list[str]
    train: Part
    cpt: Part
    test: Part
    base: Part | None = None
    general: Part | None = None
    valid: Part | None = None
    dev: Part | None = None
    vocabulary: int = 0

    def parts(self) -> dict[str, Part]:
        """Those that are there, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Part)}


@dataclass(frozen=True)
class Model:
    """Where a model comes from, exactly one of: `source`, a folder or hub id; `module`, a command that writes a folder;
    `first_layers_of` another model; `config`, trained here by cpt on `base` and sft on `general`.

    cpt and sft: options of `train.cpt` and `train.sft`.   shape: known name of its shape, to predict memory.
    """

    source: str = ""
    module: str = ""
    first_layers_of: str = ""
    layers: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    cpt: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    chat: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Train:
    """Options of `train.cpt` and `train.sft` for experts; `finetuning` replaces some of sft for the large models.

    prompt: of every model that is fine-tuned here.   ranks: processes of a model's fine-tuning, by label.
    """

    cpt: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] = field(default_factory=dict)
    prompt: str = "paper"
    chat: str = "auto"
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decode:
    batch_size: int = 16
    max_new_tokens: int = 256
    dtype: str = ""


@dataclass(frozen=True)
class Fit:
    """Weights fitted on the corpus's `dev` text: of L and the two experts, and of all five models."""

    fits: list[str] = field(default_factory=lambda: list(FITTED))
    l2: float = 0.0


@dataclass(frozen=True)
class Score:
    """bertscore: encoder by target language, `{model = NAME or DIR, layers = N}`."""

    metrics: list[str] = field(default_factory=lambda: ["bleu", "chrf"])
    samples: int = 1000
    bertscore: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """jobs: steps that run in parallel.   threads: of each step (0: PyTorch's default).

    devices: GPUs by number, such as `["0", "1"]`: one step on each, instead of `jobs`.
    """

    jobs: int = 1
    threads: int = 0
    devices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Expect:
    """Tokens of a training pair with its prompt and of a CPT sentence, from which memory is predicted."""

    pair_tokens: int = 100
    text_tokens: int = 50


@dataclass(frozen=True)
class Study:
    title: str
    small: str
    larges: list[str]
    corpora: dict[str, Corpus]
    models: dict[str, Model]
    finetuning: list[str] = field(default_factory=list)
    expressions: list[str] = field(default_factory=list)
    compare_with_paper: bool = False
    seed: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    decode: Decode = field(default_factory=Decode)
    fit: Fit = field(default_factory=Fit)
    score: Score = field(default_factory=Score)
    run: Run = field(default_factory=Run)
    expect: Expect = field(default_factory=Expect)

    def directions(self) -> dict[str, str]:
        """Every direction, with the name of its corpus."""
        return {direction: name for name, corpus in self.corpora.items() for direction in corpus.directions}


def read_study(path: Path) -> Study:
    """Raises InputError that names the file, the key and what would be right."""
    try:
        study: Study = _value(Study, tomllib.loads(path.read_text(encoding="utf-8")), "")
        _check(study)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return study


def _value(hint: Any, value: Any, name: str) -> Any:
    """A TOML value as its field's type; `name` is its key in the file. Raises InputError for another type."""
    if get_origin(hint) is UnionType:  # `Part | None`: a table that is there is a Part
        hint = get_args(hint)[0]
    if hint is Any:
        return value
    kind = dict if is_dataclass(hint) else get_origin(hint) or hint
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {value!r}; it must be {KINDS[kind]}")
    if is_dataclass(hint):
        return _table(hint, value, f"{name}." if name else "")
    if kind is dict:
        return {key: _value(get_args(hint)[1], entry, f"{name}.{key}") for key, entry in value.items()}
    return [_value(get_args(hint)[0], entry, name) for entry in value] if kind is list else value


def _table(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    """A dataclass from a TOML table."""
    known = {entry.name: entry for entry in fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(f"unknown key {prefix}{name}; did you mean {prefix}{nearest(name, known)}?")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise InputError(f"{prefix}{name} is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, prefix + name) for name, value in values.items()})


def _check(study: Study) -> None:
    """Raises InputError where parts of the study do not fit together."""

    def known(key: str, names: Iterable[str], choices: Iterable[str]) -> None:
        for name in names:
            if name not in choices:
                raise InputError(f"{key} names {name}; known are {', '.join(choices)}")

    known("small", [study.small], study.models)
    known("larges", study.larges, study.models)
    known("finetuning", study.finetuning, (study.small, *study.larges))
    known("expressions", study.expressions, EXPRESSIONS)
    known("fit.fits", study.fit.fits, FITTED)
    for label, model in study.models.items():
        if sum(map(bool, (model.source, model.module, model.first_layers_of, model.config))) != 1:
            raise InputError(f"models.{label} needs one of source, module, first_layers_of and config")
        if model.first_layers_of:
            known(f"models.{label}.first_layers_of", [model.first_layers_of], study.models)
    for name, corpus in study.corpora.items():
        for language in corpus.languages:
            language_name(language)
        known(f"corpora.{name}.directions", corpus.directions, [*map("-".join, permutations(corpus.languages, 2))])
        for part_name, part in corpus.parts().items():
            if bool(part.split) == bool(part.files):
                raise InputError(f"corpora.{name}.{part_name} needs either split or files")
            if part.lines and (len(part.lines) != 2 or not 1 <= part.lines[0] <= part.lines[1]):
                raise InputError(f"corpora.{name}.{part_name}.lines is {part.lines}; expected [first, last]")
        if study.fit.fits and corpus.dev is None:
            raise InputError(f"corpora.{name} has no dev, on which weights are fitted; or give fit.fits = []")
