"""A study's TOML file: corpora, models, how experts are trained, what is decoded and fitted, and on what machine.

Every key is a field of a dataclass below, with its default; an unknown one is refused with the nearest known name. What
the paper leaves unknown is a key like any other, so one line changes it.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from corpora import language_name
from minillama.errors import InputError

PARTS = ("base", "general", "train", "cpt", "valid", "dev", "test")
# What is decoded of each large model: see eval/expressions.py.
FITS = ("likelihood", "all", "bleu")


@dataclass(frozen=True)
class Part:
    """Sentence pairs of one purpose: a named split such as `alt:ja-en:train`, or files with `{language}` in the name.

    lines: first and last line that count, from 1; empty: all.
    """

    split: str = ""
    files: str = ""
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """base and general: text that models made here begin with. cpt: one side each. valid: while training."""

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
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Model:
    """Where a model comes from: a folder or hub id, a module that writes a folder, another's first layers, or its
    config, with weights made here by cpt on `base` and sft on `general`. Options are those of `train.cpt`, `train.sft`.
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
    """Options of `train.cpt` and `train.sft` for experts; `finetuning`: over those of sft, for large models.

    prompt: of everything that is fine-tuned here.   ranks: processes for a model's fine-tuning, by label.
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
    """Weights fitted on the corpus's `dev`: of L and the two experts, of all five models, and for BLEU."""

    fits: list[str] = field(default_factory=lambda: list(FITS))
    l2: float = 0.0


@dataclass(frozen=True)
class Score:
    """bertscore: encoder by target language, `{model = NAME or DIR, layers = N}`."""

    metrics: list[str] = field(default_factory=lambda: ["bleu", "chrf"])
    samples: int = 1000
    bertscore: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Steps side by side, the threads of each (0: PyTorch's default); devices: one step each, such as `["0", "1"]`."""

    jobs: int = 1
    threads: int = 0
    devices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hardware:
    """A device that the plan is made for: bf16 arithmetic and memory on paper, and the shares of them to expect."""

    memory_gib: float
    tflops: float
    bandwidth_gbs: float
    training_share: float = 0.35
    decoding_share: float = 0.5


@dataclass(frozen=True)
class Expect:
    """Tokens of a sentence that the plan counts with: a training pair with its prompt, CPT text, an output."""

    pair_tokens: int = 100
    text_tokens: int = 50
    prompt_tokens: int = 60
    output_tokens: int = 40
    pairs: dict[str, int] = field(default_factory=dict)


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
    hardware: dict[str, Hardware] = field(default_factory=dict)
    expect: Expect = field(default_factory=Expect)

    def directions(self) -> dict[str, str]:
        """Every direction, with the name of its corpus."""
        return {direction: name for name, corpus in self.corpora.items() for direction in corpus.directions}


def read_study(path: Path) -> Study:
    """Raises InputError that names the file, the key and what would be right."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None
    study = _build(Study, values, str(path), "")
    _check(study, str(path))
    return study


def _build(kind: type, values: Mapping[str, Any], path: str, where: str) -> Any:
    """A dataclass from a TOML table, tables inside it too."""
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"{path}: unknown key {where}{name}; did you mean {where}{near[0]}?")
    hints = get_type_hints(kind)
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise InputError(f"{path}: {where}{name} is missing")
    return kind(**{name: _value(hints[name], value, path, where + name) for name, value in values.items()})


def _value(hint: Any, value: Any, path: str, where: str) -> Any:
    if get_origin(hint) is UnionType:
        hint = get_args(hint)[0]
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        if not isinstance(value, dict):
            raise InputError(f"{path}: {where} is {value!r}; it must be a table")
        return {name: _value(inner, entry, path, f"{where}.{name}") for name, entry in value.items()}
    if get_origin(hint) is list:
        inner = get_args(hint)[0]
        if not isinstance(value, list):
            raise InputError(f"{path}: {where} is {value!r}; it must be a list")
        return [_value(inner, entry, path, where) for entry in value]
    if hint is Any:
        return value
    if hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {where} is {value!r}; it must be a table")
        return _build(hint, value, path, f"{where}.")
    fine = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if hint is float and type(value) is int:
        return float(value)
    if not fine:
        kinds = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{path}: {where} is {value!r}; it must be {kinds[hint]}")
    return value


def _check(study: Study, path: str) -> None:
    """What a dataclass alone does not see."""
    from eval.expressions import EXPRESSIONS

    for label in (study.small, *study.larges):
        if label not in study.models:
            raise InputError(f"{path}: no [models.{label!r}], which small and larges name")
    for label, model in study.models.items():
        ways = [bool(model.source), bool(model.module), bool(model.first_layers_of), bool(model.config)]
        if sum(ways) != 1:
            raise InputError(f"{path}: models.{label} needs one of source, module, first_layers_of and config")
        if model.first_layers_of and model.first_layers_of not in study.models:
            raise InputError(f"{path}: models.{label}.first_layers_of names {model.first_layers_of}, which is no model")
    for name in study.finetuning:
        if name not in (study.small, *study.larges):
            raise InputError(f"{path}: finetuning names {name}; known are {', '.join((study.small, *study.larges))}")
    for name in study.expressions:
        if name not in EXPRESSIONS:
            raise InputError(f"{path}: expressions names {name}; known are {', '.join(EXPRESSIONS)}")
    for name in study.fit.fits:
        if name not in FITS:
            raise InputError(f"{path}: fit.fits names {name}; known are {', '.join(FITS)}")
    for name, corpus in study.corpora.items():
        for language in corpus.languages:
            language_name(language)
        right = {f"{a}-{b}" for a in corpus.languages for b in corpus.languages if a != b}
        for direction in corpus.directions:
            if direction not in right:
                raise InputError(
                    f"{path}: corpora.{name}.directions has {direction}; expected {', '.join(sorted(right))}"
                )
        for part_name, part in corpus.parts().items():
            if bool(part.split) == bool(part.files):
                raise InputError(f"{path}: corpora.{name}.{part_name} needs either split or files")
            if part.lines and (len(part.lines) != 2 or not 1 <= part.lines[0] <= part.lines[1]):
                raise InputError(f"{path}: corpora.{name}.{part_name}.lines is {part.lines}; expected [first, last]")
        if study.fit.fits and corpus.dev is None:
            raise InputError(f"{path}: corpora.{name} has no dev, on which weights are fitted; or give fit.fits = []")
