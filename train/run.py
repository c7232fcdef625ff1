"""From a command line to a finished model: what CPT and SFT share around the loop."""

import argparse
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from corpora import Prompt
from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.config import read_json
from minillama.files import atomic_write, resolve_folder
from minillama.weights import open_folder
from train.checkpoint import finish, is_finished
from train.config import write_toml
from train.data import Example
from train.distributed import World, unsharded
from train.dry_run import show
from train.loop import Trainer
from train.lora import add_adapters, layer_numbers, merge, write_adapter
from train.report import Reporter
from train.settings import DTYPES, Settings, check_output

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "collab-mt")


@dataclass(frozen=True)
class Start:
    """What a run starts from, before any weight is read."""

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

    def model(self, settings: Settings, world: World) -> Llama:
        """The weights, in the settings' dtype on the device; with many ranks on the CPU, whence shards are taken."""
        dtype = DTYPES[settings.dtype]
        device = world.device if world.size == 1 else torch.device("cpu")
        if self.folder is None:
            return Llama(self.config).init_weights(settings.seed).to(device=device, dtype=dtype)
        return Llama.from_pretrained(self.folder, dtype=dtype, device=device)


def load_start(arguments: argparse.Namespace, world: World) -> Start:
    """The configuration and tokenizer that the arguments name. Raises InputError where they do not fit."""
    if arguments.init:
        if not arguments.tokenizer:
            raise InputError("--init needs --tokenizer DIR: fresh weights come without one")
        path, folder = Path(arguments.init), None
        if not path.is_file():
            raise InputError(f"--init {path}: no such file")
        config = LlamaConfig.from_dict(read_json(path), str(path))
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer)
    else:
        # On one rank first: a model of the hub is fetched once.
        folder = world.first(lambda: resolve_folder(arguments.model))
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer or folder)
        config = open_folder(folder).config
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}; "
            "vocab_size must be at least the tokenizer's"
        )
    if arguments.lora_rank:
        layer_numbers(arguments.lora_layers, config.num_hidden_layers)
    return Start(config, tokenizer, folder)


def shorter_than(examples: Sequence[Example], limit: int) -> list[Example]:
    return [example for example in examples if len(example.tokens) <= limit]


def train_and_save(
    arguments: argparse.Namespace,
    settings: Settings,
    world: World,
    start: Start,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    notes: dict[str, Any],
    prompt: Prompt | None,
) -> int:
    """Train on the examples and leave a normal Hugging Face folder (or an adapter), with the run's record beside it."""
    if arguments.valid and not held_out:
        raise InputError(f"--valid {' '.join(arguments.valid)}: no example in it; nothing would be validated")
    if arguments.dry_run:
        if world.main:
            show(start.config, start.tokenizer, examples, settings, world)
        return 0
    output = Path(arguments.output)
    model = start.model(settings, world)
    adapted(model, settings)
    trainer = Trainer(model, examples, held_out, settings, output, world, arguments.tensorboard)
    tokens, targets = sum(len(e.tokens) for e in examples), sum(e.targets for e in examples)
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(numbers[name] for name in trainer.optimizer.parameters)
    ranks = f" ({world.size} ranks)" if world.size > 1 else ""
    world.say(
        f"{len(examples):,} examples, {tokens:,} tokens ({targets / tokens:.0%} targets), {len(held_out):,} held out; "
        f"{trainer.total_steps:,} steps in {settings.epochs} epochs on {world.device}{ranks}, "
        f"{trained:,} of {sum(numbers.values()):,} parameters in {settings.dtype}"
    )
    record = {
        "settings": settings.as_dict(),
        "data": notes,
        "sha256": checksums(arguments),
        "examples_digest": trainer.fingerprint["examples"],
        "examples": len(examples),
        "tokens": tokens,
        "targets": targets,
        "parameters": sum(numbers.values()),
        "trained_parameters": trained,
        "ranks": world.size,
        "versions": versions(),
    }
    world.first(lambda: write_record(output, arguments, record))
    outcome = trainer.run(arguments.resume, Reporter(silent=not world.main))
    result = unsharded(model, world, lambda: adapted(Llama(start.config), settings))

    def write(folder: Path) -> None:
        assert result is not None
        if settings.lora_rank and not arguments.merge:
            write_adapter(result, settings, arguments.model or "", folder)
        else:
            merge(result)
            result.to(DTYPES[settings.save_dtype or settings.dtype]).write_files(folder)
        start.tokenizer.save(folder)
        if prompt is not None:
            prompt.save(folder)
        (folder / "run.json").write_text(_json({**record, **asdict(outcome)}), encoding="utf-8")

    world.first(lambda: finish(output, write))
    if not arguments.leave_checkpoints:
        trainer.checkpoints.clear()
    best = f", best validation loss {outcome.best_loss:.4f} at step {outcome.best_step}" if outcome.best_loss else ""
    world.say(f"{output}: {outcome.steps:,} steps in {outcome.seconds:,.0f} s{best}")
    return 0


def adapted(model: Llama, settings: Settings) -> Llama:
    """The model, with adapters if the settings have some."""
    if settings.lora_rank:
        add_adapters(model, settings)
    return model


def write_record(output: Path, arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """run.toml, which `--config` reads, and run.json, before the first step."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        given = {name: value for name, value in vars(arguments).items() if name not in ("config", "dry_run", "resume")}
        atomic_write(output / "run.toml", write_toml(given))
        atomic_write(output / "run.json", _json(record))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None


def checksums(arguments: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of every file that --text, --train and --valid name; a named split has none."""
    names = [name for option in ("text", "train", "valid") for name in getattr(arguments, option, None) or []]
    found = {}
    for name in names:
        if Path(name).is_file():
            with open(name, "rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def prepare(arguments: argparse.Namespace, settings: Settings) -> bool:
    """Check the arguments and --output before any work; False when --resume finds the model finished."""
    output = Path(arguments.output)
    if (settings.keep == "best" or settings.patience) and not arguments.valid:
        raise InputError("--keep best and --patience need --valid: without it no weights are known to be better")
    if settings.lora_rank and arguments.init:
        raise InputError("--lora-rank with --init: an adapter needs a trained model under it; give --model")
    if arguments.merge and not settings.lora_rank:
        raise InputError("--merge without --lora-rank: there is no adapter to merge")
    if arguments.dry_run:
        return True
    check_output(output, arguments.resume)
    if not (arguments.resume and is_finished(output)):
        return True
    if not arguments.leave_checkpoints:  # a kill may have come between the model and their removal
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return False


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
