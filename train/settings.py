"""The settings of a run and their command line, shared by CPT and SFT. Defaults are the paper's where it has one."""

import argparse
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from minillama.errors import InputError
from train.data import PACKINGS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


RANGES = (
    ("lr", 1e-12, 1.0),
    ("beta1", 0.0, 0.99999),
    ("beta2", 0.0, 0.99999),
    ("clip", 0.0, 1e9),
    ("weight_decay", 0.0, 1e3),
    ("min_lr_ratio", 0.0, 1.0),
    ("seed", 0, 2**63 - 1),
)


@dataclass(frozen=True)
class Settings:
    """What decides the weights that come out, but for the data. `batch_size`: see `Schedule`."""

    epochs: int
    lr: float = 2e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    batch_size: int = 4
    micro_batch_size: int = 0
    packing: str = "step"
    sequence_length: int = 2048
    max_length: int = 0
    dtype: str = "float32"
    compute_dtype: str = ""
    save_dtype: str = ""
    seed: int = 0
    eval_every: int = 0
    patience: int = 0
    keep: str = "last"
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("micro_batch_size", 0),
            ("sequence_length", 2),
            ("warmup_steps", 0),
            ("patience", 0),
            ("eval_every", 0),
            ("checkpoint_every", 0),
            ("max_length", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name, low, high in RANGES:
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {getattr(self, name)}; it must lie between {low:g} and {high:g}")
        if self.max_length == 1:
            raise InputError("--max-length is 1; a sequence needs at least 2 tokens, one to predict the other")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


HELP = {
    "epochs": "passes over the data",
    "lr": "peak learning rate",
    "schedule": "after warm-up",
    "warmup_steps": "optimizer steps from 0 to the peak",
    "min_lr_ratio": "where cosine ends, as a share of the peak",
    "weight_decay": "AdamW's, on matrices only",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "clip": "largest norm of the gradient; 0: no clipping",
    "batch_size": "examples per optimizer step, on all ranks together; packed sequences with --packing epoch",
    "micro_batch_size": "of these per forward pass, gradients accumulated; 0: all at once",
    "packing": "step: a forward pass is one row without padding; epoch: examples fill sequences; off: padded rows",
    "sequence_length": "tokens of a sequence with --packing epoch",
    "max_length": "longest sequence in tokens; 0: the model's context",
    "dtype": "of weights and optimizer state",
    "compute_dtype": "of matrix products, when another (mixed precision)",
    "save_dtype": "of the finished model's file, when another",
    "seed": "of data order and fresh weights",
    "eval_every": "steps between validations; 0: once an epoch",
    "patience": "stop after this many validations without a better loss; 0: never",
    "keep": "which weights the finished model has: the last, or the best on --valid",
    "checkpoint_every": "steps between checkpoints; 0: once an epoch",
}
CHOICES = {
    "schedule": ["constant", "cosine"],
    "dtype": list(DTYPES),
    "compute_dtype": list(DTYPES),
    "save_dtype": list(DTYPES),
    "keep": ["last", "best"],
    "packing": list(PACKINGS),
}


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Where the model comes from and goes to, and every field of Settings; `defaults`: where a command has its own."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="folder or hub id to start from")
    source.add_argument(
        "--init", metavar="CONFIG", help="config.json to start from, with fresh weights (needs --tokenizer)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, if not the model's")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the finished model and of the run")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output, if there is one"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    group = parser.add_argument_group("settings")
    for field in fields(Settings):
        name = "--" + field.name.replace("_", "-")
        default = defaults.get(field.name, field.default)
        kind = type(default)
        text = HELP[field.name] + (f" (default {default})" if default != "" else "")
        group.add_argument(
            name,
            type=kind,
            default=default,
            choices=CHOICES.get(field.name),
            help=text,
            metavar=None if field.name in CHOICES else kind.__name__.upper(),
        )


def settings_from(arguments: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})


def check_output(output: Path, resume: bool) -> None:
    """A finished model is never overwritten, a run only gone on with when asked."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; it must be a folder")
    if not resume and output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {output}: is not empty; give --resume to go on with that run, or another folder")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
