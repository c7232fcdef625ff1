"""Settings of a run, shared by CPT and SFT: the command line and `--config run.toml`, which the command line overrides.

Each setting stands once, in `Settings`, with its default, its range and its help; options, keys of a configuration file
and the record of a run are derived from it. Defaults are the paper's where it has one. This file does not import torch,
so `--help` answers at once.
"""

import argparse
import math
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minillama.cli import Parser, nearest
from minillama.errors import InputError

DTYPES = ("float32", "bfloat16")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Settings that do not change the weights, so a resumed run may have others.
CHANGEABLE_ON_RESUME = ("checkpoint_every", "keep_checkpoints", "save_dtype", "checkpoint_activations")


def option(default: Any, text: str, low: float = -math.inf, high: float = math.inf, choices: Any = ()) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": list(choices)})


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights, except the data. Raises InputError for values out of range."""

    epochs: int = option(3, "passes over the data", low=1)
    lr: float = option(2e-5, "peak learning rate", low=1e-12, high=1.0)
    schedule: str = option("constant", "learning rate after warm-up", choices=["constant", "cosine"])
    warmup_steps: int = option(0, "optimizer steps from 0 to the peak learning rate", low=0)
    min_lr_ratio: float = option(0.0, "final learning rate of cosine, as a fraction of the peak", low=0.0, high=1.0)
    weight_decay: float = option(0.01, "of AdamW, on matrices only", low=0.0, high=1e3)
    beta1: float = option(0.9, "of AdamW", low=0.0, high=0.99999)
    beta2: float = option(0.999, "of AdamW", low=0.0, high=0.99999)
    clip: float = option(1.0, "maximum norm of the gradient; 0: no clipping", low=0.0, high=1e9)
    batch_size: int = option(
        4, "examples per optimizer step, on all ranks together; packed sequences with --packing epoch", low=1
    )
    micro_batch_size: int = option(0, "of these per forward pass, gradients accumulated; 0: all at once", low=0)
    packing: str = option(
        "step",
        "step: a forward pass is one row without padding; epoch: examples fill sequences; off: padded rows",
        choices=("off", "step", "epoch"),
    )
    sequence_length: int = option(2048, "tokens of a sequence with --packing epoch", low=2)
    max_length: int = option(0, "longest sequence in tokens; 0: the model's context", low=0)
    dtype: str = option("float32", "of weights", choices=DTYPES)
    compute_dtype: str = option("", "of matrix multiplications, if different (mixed precision)", choices=DTYPES)
    save_dtype: str = option("", "of the finished model's file, if different", choices=DTYPES)
    optimizer_state: str = option("", "dtype of AdamW's two moments, if not that of the weights", choices=DTYPES)
    checkpoint_activations: bool = option(False, "keep only each layer's input and recompute the layer in backward")
    release_gradients: bool = option(False, "update each weight in backward and free its gradient (needs --clip 0)")
    compile: bool = option(False, "compile the layers with torch.compile")
    lora_rank: int = option(0, "train low-rank adapters of this rank instead of the weights; 0: the weights", low=0)
    lora_alpha: float = option(0.0, "the adapters' scale is alpha / rank; 0: twice the rank", low=0.0, high=1e6)
    lora_targets: str = option(",".join(LORA_TARGETS), "linear layers that get an adapter, separated by commas")
    lora_layers: str = option("all", "numbers of the decoder layers that get adapters, such as 0-3,12; or all")
    seed: int = option(0, "of data order and fresh weights", low=0, high=2**63 - 1)
    eval_every: int = option(0, "steps between validations; 0: once an epoch", low=0)
    patience: int = option(0, "stop after this many validations without a better loss; 0: never", low=0)
    keep: str = option("last", "weights of the finished model; best: on --valid", choices=("last", "best"))
    checkpoint_every: int = option(0, "steps between checkpoints; 0: once an epoch", low=0)
    keep_checkpoints: int = option(2, "number of checkpoints to keep, besides the best on --valid", low=1)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low, high = getattr(self, entry.name), entry.metadata["low"], entry.metadata["high"]
            if low > -math.inf and not low <= value <= high:
                limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise InputError(f"{flag(entry.name)} is {value}; it must be {limit}")
        if self.max_length == 1:
            raise InputError("--max-length is 1; a sequence needs at least 2 tokens, one to predict the other")
        if self.release_gradients and self.clip:
            raise InputError(
                f"--release-gradients with --clip {self.clip:g}: clipping needs all gradients at once; give --clip 0"
            )
        if unknown := [target for target in self.targets if target not in LORA_TARGETS]:
            raise InputError(f"--lora-targets: unknown {', '.join(unknown)}; known are {', '.join(LORA_TARGETS)}")

    @property
    def targets(self) -> list[str]:
        """The linear layers that `lora_targets` names."""
        return self.lora_targets.replace(" ", "").split(",")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The model to start from, the output, and every field of Settings; `defaults`: a command's own."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="folder or hub id to start from")
    source.add_argument("--init", metavar="CONFIG", help="config.json for fresh weights (needs --tokenizer)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, if not the model's")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the run and of the finished model")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options; the command line wins")
    for name, text in (
        ("--resume", "resume from the last checkpoint in --output"),
        ("--dry-run", "show the plan and three samples; write nothing"),
        ("--merge", "with --lora-rank: save a normal model"),
        ("--tensorboard", "write OUTPUT/tensorboard too"),
        ("--leave-checkpoints", "keep the checkpoints of a finished run"),
    ):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=False, help=text)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    add_settings(parser, **defaults)


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """An option for every field of Settings."""
    group = parser.add_argument_group("settings")
    for entry in fields(Settings):
        default = defaults.get(entry.name, entry.default)
        kind, choices, text = type(default), entry.metadata["choices"], entry.metadata["help"]
        if kind is bool:
            group.add_argument(flag(entry.name), action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        group.add_argument(
            flag(entry.name),
            type=kind,
            default=default,
            choices=choices or None,
            help=text + (f" (default {default})" if default != "" else ""),
            metavar=None if choices else kind.__name__.upper(),
        )


def settings_from(arguments: argparse.Namespace) -> Settings:
    return Settings(**{entry.name: getattr(arguments, entry.name) for entry in fields(Settings)})


def check_output(output: Path, resume: bool) -> None:
    """A finished model is never overwritten; a run is resumed only on request. Raises InputError."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; it must be a folder")
    if not resume and output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {output}: is not empty; give --resume to resume that run, or another folder")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `argv`, and those of its --config file that it does not set itself.

    A key of the file is an option's name, with `-` or `_`. The file becomes arguments before `argv`, so argparse alone
    knows types, choices and what is required. Raises InputError that names the key or the option.
    """
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(list(argv))[0].config
    if path is None:
        return parser.parse_args(argv)
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    given = {word.split("=")[0] for word in argv}
    typed = {name for name, action in known.items() if not given.isdisjoint(action.option_strings)}
    if typed & {"model", "init"}:  # each excludes the other
        typed |= {"model", "init"}
    words: list[str] = []
    for key, value in _read_toml(Path(path)).items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known).replace("_", "-")
            raise InputError(f"--config {path}: unknown key {key!r}; did you mean {near!r}?")
        if name not in typed:
            words += _arguments(known[name], key, value, path)
    return parser.parse_args([*words, *argv])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not TOML ({error})") from None


def _arguments(action: argparse.Action, key: str, value: Any, path: str) -> list[str]:
    """The arguments on a command line that mean `key = value`."""
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f"--config {path}: {key} is {value!r}; it must be true or false")
        return [name if value else action.option_strings[1]]
    if action.nargs == "+" and isinstance(value, list):
        return [name, *map(str, value)]
    if value == "" and action.choices:  # the default of an optional choice
        return []
    return [f"{name}={value}"]
