"""The settings of a run and their command line, shared by CPT and SFT. Defaults are the paper's where it has one.

Each setting stands once, in `Settings`, with its default, its range and its help; options, `--config` keys and the
record of a run are derived from that.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from minillama.errors import InputError
from train.data import PACKINGS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEEP = ("last", "best")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def option(default: Any, text: str, low: float | None = None, high: float | None = None, choices: Any = ()) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": list(choices)})


@dataclass(frozen=True)
class Settings:
    """What decides the weights that come out, but for the data. `batch_size`: see `Schedule`. Raises InputError."""

    epochs: int = option(3, "passes over the data", low=1)
    lr: float = option(2e-5, "peak learning rate", low=1e-12, high=1.0)
    schedule: str = option("constant", "after warm-up", choices=["constant", "cosine"])
    warmup_steps: int = option(0, "optimizer steps from 0 to the peak", low=0)
    min_lr_ratio: float = option(0.0, "where cosine ends, as a share of the peak", low=0.0, high=1.0)
    weight_decay: float = option(0.01, "AdamW's, on matrices only", low=0.0, high=1e3)
    beta1: float = option(0.9, "AdamW's", low=0.0, high=0.99999)
    beta2: float = option(0.999, "AdamW's", low=0.0, high=0.99999)
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", low=0.0, high=1e9)
    batch_size: int = option(
        4, "examples per optimizer step, on all ranks together; packed sequences with --packing epoch", low=1
    )
    micro_batch_size: int = option(0, "of these per forward pass, gradients accumulated; 0: all at once", low=0)
    packing: str = option(
        "step",
        "step: a forward pass is one row without padding; epoch: examples fill sequences; off: padded rows",
        choices=PACKINGS,
    )
    sequence_length: int = option(2048, "tokens of a sequence with --packing epoch", low=2)
    max_length: int = option(0, "longest sequence in tokens; 0: the model's context", low=0)
    dtype: str = option("float32", "of weights", choices=DTYPES)
    compute_dtype: str = option("", "of matrix products, when another (mixed precision)", choices=DTYPES)
    save_dtype: str = option("", "of the finished model's file, when another", choices=DTYPES)
    optimizer_state: str = option(
        "", "type of AdamW's two moments, when another than the weights'", choices=[*DTYPES, "int8"]
    )
    checkpoint_activations: bool = option(
        False, "keep only each layer's input for backward and compute the layer once more there"
    )
    release_gradients: bool = option(
        False, "update each weight in backward and drop its gradient at once (needs --clip 0)"
    )
    compile: bool = option(False, "compile the layers with torch.compile")
    lora_rank: int = option(0, "train low-rank adapters of this rank instead of the weights; 0: the weights", low=0)
    lora_alpha: float = option(0.0, "the adapters' scale is alpha / rank; 0: twice the rank", low=0.0, high=1e6)
    lora_targets: str = option(",".join(LORA_TARGETS), "linear layers that get an adapter, separated by commas")
    lora_layers: str = option("all", "numbers of the decoder layers that get adapters, such as 0-3,12; or all")
    seed: int = option(0, "of data order and fresh weights", low=0, high=2**63 - 1)
    eval_every: int = option(0, "steps between validations; 0: once an epoch", low=0)
    patience: int = option(0, "stop after this many validations without a better loss; 0: never", low=0)
    keep: str = option("last", "which weights the finished model has: the last, or the best on --valid", choices=KEEP)
    checkpoint_every: int = option(0, "steps between checkpoints; 0: once an epoch", low=0)
    keep_checkpoints: int = option(2, "how many of the last checkpoints a run keeps, beside the best on --valid", low=1)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low, high = getattr(self, entry.name), entry.metadata["low"], entry.metadata["high"]
            if low is not None and high is not None and not low <= value <= high:
                raise InputError(f"{flag(entry.name)} is {value}; it must lie between {low:g} and {high:g}")
            if low is not None and value < low:
                raise InputError(f"{flag(entry.name)} is {value}; it must be at least {low}")
        if self.max_length == 1:
            raise InputError("--max-length is 1; a sequence needs at least 2 tokens, one to predict the other")
        if self.release_gradients and self.clip:
            raise InputError(
                f"--release-gradients with --clip {self.clip:g}: a gradient that is gone cannot be clipped by the norm "
                "of all; give --clip 0"
            )
        if unknown := [target for target in self.targets if target not in LORA_TARGETS]:
            raise InputError(f"--lora-targets: unknown {', '.join(unknown)}; known are {', '.join(LORA_TARGETS)}")

    @property
    def targets(self) -> list[str]:
        """The linear layers that `lora_targets` names."""
        return self.lora_targets.replace(" ", "").split(",")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# What may change between the parts of one run: it decides no weight of it.
FREE = ("checkpoint_every", "keep_checkpoints", "save_dtype", "checkpoint_activations")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Where the model comes from and goes to, and every field of Settings; `defaults`: where a command has its own."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="folder or hub id to start from")
    source.add_argument(
        "--init", metavar="CONFIG", help="config.json to start from, with fresh weights (needs --tokenizer)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, if not the model's")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the finished model and of the run")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options; the command line wins")
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--resume", action=yes_no, default=False, help="go on from the last checkpoint in --output")
    parser.add_argument(
        "--dry-run", action=yes_no, default=False, help="show what would be done, and three samples; write nothing"
    )
    parser.add_argument("--merge", action=yes_no, default=False, help="with --lora-rank: save a normal model")
    parser.add_argument("--tensorboard", action=yes_no, default=False, help="write OUTPUT/tensorboard too")
    parser.add_argument(
        "--leave-checkpoints", action=yes_no, default=False, help="keep the checkpoints of a run that is finished"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    add_settings(parser, **defaults)


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """An option for every field of Settings."""
    yes_no = argparse.BooleanOptionalAction
    group = parser.add_argument_group("settings")
    for entry in fields(Settings):
        default = defaults.get(entry.name, entry.default)
        kind, choices, text = type(default), entry.metadata["choices"], entry.metadata["help"]
        if kind is bool:
            group.add_argument(flag(entry.name), action=yes_no, default=default, help=text)
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
