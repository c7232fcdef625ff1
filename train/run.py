"""From a command line to a finished model: what CPT and SFT have in common around the training loop."""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from corpora import Prompt
from minillama.config import LlamaConfig, read_json
from minillama.errors import InputError
from minillama.files import atomic_write, resolve_folder
from minillama.machine import versions
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from minillama.weights import open_folder
from train.checkpoint import digest_of, finish, is_finished
from train.config import Settings, check_output
from train.distributed import DistributedContext, started, unsharded
from train.dry_run import show
from train.lora import add_adapters, merge, write_adapter
from train.metrics import Reporter
from train.packing import Example
from train.trainer import Trainer

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "collab-mt")


@dataclass(frozen=True)
class Start:
    """The model that a run starts from, before any weight is read. `folder` None: fresh weights."""

    config: LlamaConfig
    tokenizer: Tokenizer
    folder: Path | None

    @property
    def end_token(self) -> int | None:
        """The model's end-of-text token: the first of its configuration's."""
        return self.config.eos_token_id[0] if self.config.eos_token_id else None

    def longest(self, settings: Settings) -> int:
        context = self.config.max_position_embeddings
        return min(settings.max_length or context, context)

    def model(self, settings: Settings, world: DistributedContext) -> Llama:
        """The model in the settings' dtype, on the device; with several ranks on the CPU, where it is sharded from."""
        dtype = getattr(torch, settings.dtype)
        device = world.device if world.size == 1 else torch.device("cpu")
        if self.folder is None:
            return Llama(self.config).init_weights(settings.seed).to(device=device, dtype=dtype)
        return Llama.from_pretrained(self.folder, dtype=dtype, device=device)


@dataclass(frozen=True)
class Data:
    """What a command trains on and validates on, its notes in run.json, and the prompt to save with the model."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    notes: dict[str, Any]
    prompt: Prompt | None = None


def run(arguments: argparse.Namespace, settings: Settings, load: Callable[[Start, DistributedContext], Data]) -> int:
    """Train on what `load` returns and write a normal Hugging Face folder, or an adapter. Returns the exit code.

    Arguments and --output are checked before any work. Nothing is done where --resume finds the model finished.
    """
    with started(arguments.device) as world:
        if world.on_main(lambda: _is_finished(arguments, settings)):
            world.log(f"{arguments.output}: already finished")
            return 0
        start = _load_start(arguments, world)
        data = load(start, world)
        if not data.examples:
            raise InputError("there is nothing to train on: no example is left after reading")
        if arguments.valid and not data.held_out:
            raise InputError(f"--valid {' '.join(arguments.valid)}: no example in it; nothing would be validated")
        if not arguments.dry_run:
            _train(arguments, settings, world, start, data)
        elif world.is_main:
            show(start.config, start.tokenizer, data.examples, settings, world)
    return 0


def _load_start(arguments: argparse.Namespace, world: DistributedContext) -> Start:
    """The configuration and tokenizer that the arguments name. Raises InputError if they do not fit together."""
    if arguments.init:
        if not arguments.tokenizer:
            raise InputError("--init needs --tokenizer DIR: fresh weights come without one")
        path, folder = Path(arguments.init), None
        if not path.is_file():
            raise InputError(f"--init {path}: no such file")
        config = LlamaConfig.from_dict(read_json(path), str(path))
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer)
    else:
        folder = world.on_main(lambda: resolve_folder(arguments.model))  # so a model of the hub is downloaded once
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer or folder)
        config = open_folder(folder).config
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}; "
            "vocab_size must be at least the tokenizer's"
        )
    return Start(config, tokenizer, folder)


def _train(
    arguments: argparse.Namespace, settings: Settings, world: DistributedContext, start: Start, data: Data
) -> None:
    output, examples = Path(arguments.output), data.examples
    model = add_adapters(start.model(settings, world), settings)
    trainer = Trainer(model, examples, data.held_out, settings, output, world, arguments.tensorboard)
    tokens, labels = sum(len(e.tokens) for e in examples), sum(e.num_labels for e in examples)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(sizes[name] for name in trainer.optimizer.parameters)
    world.log(
        f"{len(examples):,} examples, {tokens:,} tokens ({labels / tokens:.0%} targets), "
        f"{trainer.total_steps:,} steps on {world.device}"
    )
    names = [name for option in ("text", "train", "valid") for name in getattr(arguments, option, None) or []]
    record = {
        "settings": asdict(settings),
        "data": data.notes,
        "sha256": {name: digest_of(Path(name)) for name in names if Path(name).is_file()},  # a named split has none
        "examples_digest": trainer.fingerprint["examples"],
        "examples": len(examples),
        "tokens": tokens,
        "targets": labels,
        "parameters": sum(sizes.values()),
        "trained_parameters": trained,
        "ranks": world.size,
        "versions": versions(*PACKAGES),
    }
    world.on_main(lambda: _write_record(output, arguments, record))
    started_at = time.monotonic()
    progress = trainer.run(arguments.resume, Reporter(silent=not world.is_main))
    outcome = {
        "steps": progress.step,
        "epochs": settings.epochs,
        "best_loss": progress.best_loss if progress.best_step else None,
        "best_step": progress.best_step or None,
        "seconds": time.monotonic() - started_at,
    }
    result = unsharded(model, world, lambda: add_adapters(Llama(start.config), settings))

    def write(folder: Path) -> None:
        assert result is not None
        if settings.lora_rank and not arguments.merge:
            write_adapter(result, settings, arguments.model or "", folder)
        else:
            merge(result)
            result.to(getattr(torch, settings.save_dtype or settings.dtype)).write_files(folder)
        start.tokenizer.save(folder)
        if data.prompt is not None:
            data.prompt.save(folder)
        (folder / "run.json").write_text(_json(record | outcome), encoding="utf-8")

    world.on_main(lambda: finish(output, write))
    if world.is_main and not arguments.leave_checkpoints:
        shutil.rmtree(trainer.checkpoints.folder, ignore_errors=True)
    world.log(f"{output}: {progress.step:,} steps in {outcome['seconds']:,.0f} s")


def _is_finished(arguments: argparse.Namespace, settings: Settings) -> bool:
    """Whether --resume finds the model finished. Raises InputError for arguments or an output that do not fit."""
    output = Path(arguments.output)
    if (settings.keep == "best" or settings.patience) and not arguments.valid:
        raise InputError("--keep best and --patience need --valid: without it no weights are known to be better")
    if settings.lora_rank and arguments.init:
        raise InputError("--lora-rank with --init: an adapter needs a trained model under it; give --model")
    if arguments.merge and not settings.lora_rank:
        raise InputError("--merge without --lora-rank: there is no adapter to merge")
    if arguments.dry_run:
        return False
    check_output(output, arguments.resume)
    if not (arguments.resume and is_finished(output)):
        return False
    if not arguments.leave_checkpoints:  # a kill may have come between writing the model and removing them
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return True


def _write_record(output: Path, arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """run.toml, which `--config` reads, and run.json, before the first step."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        omitted = ("config", "dry_run", "resume")
        saved = {name: value for name, value in vars(arguments).items() if name not in omitted and value is not None}
        atomic_write(output / "run.toml", tomli_w.dumps(saved))
        atomic_write(output / "run.json", _json(record))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
