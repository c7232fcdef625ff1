"""From a command line to a finished model: what CPT and SFT share around the loop."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from corpora import Prompt
from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.config import read_json
from minillama.device import pick_device
from minillama.weights import write_model
from train.checkpoint import finish
from train.data import Example
from train.loop import Trainer
from train.report import Reporter
from train.settings import DTYPES, Settings, check_output


def load_start(arguments: argparse.Namespace, settings: Settings) -> tuple[Llama, Tokenizer]:
    """The model to train, in the settings' dtype on the device, and its tokenizer."""
    device = pick_device(arguments.device)
    dtype = DTYPES[settings.dtype]
    if arguments.init:
        if not arguments.tokenizer:
            raise InputError("--init needs --tokenizer DIR: fresh weights come without one")
        path = Path(arguments.init)
        if not path.is_file():
            raise InputError(f"--init {path}: no such file")
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer)
        config = LlamaConfig.from_dict(read_json(path), str(path))
        model = Llama(config).init_weights(settings.seed).to(device=device, dtype=dtype)
    else:
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer or arguments.model)
        model = Llama.from_pretrained(arguments.model, dtype=dtype, device=device)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {model.config.vocab_size}; "
            "vocab_size must be at least the tokenizer's"
        )
    return model, tokenizer


def longest(model: Llama, settings: Settings) -> int:
    return min(settings.max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)


def end_token(model: Llama) -> int | None:
    """The model's end-of-text token: the first of its configuration's."""
    return model.config.eos_token_id[0] if model.config.eos_token_id else None


def shorter_than(examples: Sequence[Example], limit: int) -> list[Example]:
    return [example for example in examples if len(example.tokens) <= limit]


def train_and_save(
    arguments: argparse.Namespace,
    settings: Settings,
    model: Llama,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    notes: dict[str, Any],
    prompt: Prompt | None,
) -> int:
    """Train on the examples and leave a normal Hugging Face folder, with the run's record (run.json) beside it."""
    output = Path(arguments.output)
    trainer = Trainer(model, examples, held_out, settings, output)
    tokens, targets = sum(len(e.tokens) for e in examples), sum(e.targets for e in examples)
    print(
        f"{len(examples):,} examples, {tokens:,} tokens ({targets / tokens:.0%} targets), {len(held_out):,} held out; "
        f"{trainer.total_steps:,} steps in {settings.epochs} epochs on {model.device}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters in {settings.dtype}",
        file=sys.stderr,
    )
    outcome = trainer.run(arguments.resume, Reporter())
    record = {
        "settings": settings.as_dict(),
        "data": notes,
        "examples": len(examples),
        "tokens": tokens,
        "targets": targets,
        **asdict(outcome),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    model.to(DTYPES[settings.save_dtype or settings.dtype])

    def write(folder: Path) -> None:
        write_model(model, folder)
        tokenizer.save(folder)
        if prompt is not None:
            prompt.save(folder)
        (folder / "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    finish(output, write)
    best = f", best validation loss {outcome.best_loss:.4f} at step {outcome.best_step}" if outcome.best_loss else ""
    print(f"{output}: {outcome.steps:,} steps in {outcome.seconds:,.0f} s{best}", file=sys.stderr)
    return 0


def prepare(arguments: argparse.Namespace) -> bool:
    """Check --output before any work; False when --resume finds the model finished."""
    output = Path(arguments.output)
    check_output(output, arguments.resume)
    if (arguments.keep == "best" or arguments.patience) and not arguments.valid:
        raise InputError("--keep best and --patience need --valid: without it no weights are known to be better")
    if arguments.resume and (output / "config.json").exists():
        print(f"{output}: already finished", file=sys.stderr)
        return False
    return True
