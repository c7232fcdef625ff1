"""Our training step against transformers' in one run: `python -m train.bench [--json]`.

Both start from the same weights, see the same batches in the same order and take the same optimizer's steps, each in a
process of its own, one step in turn, so that what else the machine does falls on both. Four questions:

    full sequences      tokens/s where every token is a target and nothing is padded
    sentence pairs      target tokens/s with the paper's prompt, batches drawn at random: transformers pads, we pack
    the same steps      largest difference of the two loss curves
    large vocabulary    peak memory of a small model with 128,256 entries

A ratio is the median over steps of one system's speed over the other's in the same step.
"""

import argparse
import datetime
import importlib.metadata
import json
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from corpora import Pairs, Prompt, read_pairs, sample
from benchmarks.common import machine_name as device_name
from benchmarks.common import save
from minillama.machine import processor_name, versions
from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.chat import chat_format
from minillama.cli import Parser
from minillama.config import read_config
from minillama.errors import exit_code
from minillama.files import resolve_folder
from minillama.machine import pick_device
from train.bench_parts import (
    WIDE,
    both,
    full_sequences,
    large_vocabulary,
    loss_curves,
    sentence_pairs,
    what_each_brings,
)
from train.data import Example, responses
from train.plan import SHAPES

DEMO_TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "L"
RESULTS = Path(__file__).parent / "results"
EXAMPLES = """examples:
  python -m train.bench                                     SmolLM2-135M's shape, built-in pairs; about 20 minutes
  python -m train.bench --steps 10 --rounds 2 --json        some minutes
  python -m train.bench --model DIR --pairs train.de.gz train.en.gz --source de --target en
  python -m train.bench --shape llama-3.2-1b --dtype bfloat16 --sequences 8 --length 2048       on a GPU
"""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, config = _model(options, Path(temporary))
        examples = _examples(options, config, folder)
        with both(options, folder) as workers:
            pairs = sentence_pairs(workers, examples, options)
            brings = what_each_brings(workers[0], examples, options)
            full = full_sequences(workers, config, options)
        wide = Path(temporary) / "wide"
        Llama(WIDE).init_weights(options.seed).save_pretrained(wide)
        memory = large_vocabulary(str(wide), options)
        curves = loss_curves(folder, examples, options)
    on_cpu = options.device == "cpu"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor_name() if on_cpu else device_name(),
        "threads": (options.threads or torch.get_num_threads()) if on_cpu else None,
        "versions": versions() | {"transformers": importlib.metadata.version("transformers")},
        "model": Path(options.model).name if options.model else options.shape,
        "dtype": options.dtype,
        "tokens_per_second_ratio": full["ratio"],
        "target_tokens_per_second_ratio": pairs["ratio"],
        "peak_memory_ratio": memory["ours_bytes"] / memory["theirs_bytes"],
        "loss_difference": curves["difference"],
        "full_sequences": full,
        "sentence_pairs": pairs,
        "what_each_brings": brings,
        "large_vocabulary": memory,
        "loss_curves": curves,
    }


def _model(options: argparse.Namespace, temporary: Path) -> tuple[str, LlamaConfig]:
    """A folder that both systems load: the one given, or the shape with weights from the seed."""
    if options.model:
        folder = resolve_folder(options.model)
        return str(folder), read_config(folder)
    known: dict[str, dict[str, Any]] = {}
    for entry in tomllib.loads(SHAPES.read_text(encoding="utf-8"))["shape"]:
        known |= {name.split("/")[-1].lower(): entry for name in entry.pop("names")}
    if options.shape.lower() not in known:
        raise InputError(f"--shape {options.shape}: unknown; known: {', '.join(sorted(known))}")
    config = LlamaConfig(**known[options.shape.lower()])
    Llama(config).init_weights(options.seed).save_pretrained(temporary / "model")
    return str(temporary / "model"), config


def _examples(options: argparse.Namespace, config: LlamaConfig, folder: str) -> list[Example]:
    tokenizer = Tokenizer.from_pretrained(options.tokenizer or (folder if options.model else DEMO_TOKENIZER))
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}")
    pairs = read_pairs(options.pairs, options.source, options.target) if options.pairs else sample()
    most = max(options.steps * options.curve_batch_size, (options.rounds + 1) * options.batch_size)
    pairs = Pairs(pairs.source[:most], pairs.target[:most], 0, pairs.origin)
    languages = (options.source, options.target) if options.pairs else ("ja", "en")
    prompt, chat = Prompt.load(options.prompt), chat_format("auto", tokenizer)
    eos = config.eos_token_id[0] if config.eos_token_id else None
    return responses(pairs, languages, prompt, chat, tokenizer, config.bos_token_id, eos)


def show(result: dict[str, Any]) -> None:
    full, pairs, memory = result["full_sequences"], result["sentence_pairs"], result["large_vocabulary"]
    threads = f" with {result['threads']} threads" if result["threads"] else ""
    print(f"{result['model']}, {result['dtype']}, {result['device']}{threads}; ours, transformers, ours over theirs")
    for name, part, what in (("full sequences", full, "tokens/s"), ("sentence pairs", pairs, "target tokens/s")):
        print(
            f"{name:16}{part['ours_per_second']:10.1f}{part['theirs_per_second']:10.1f} {what:18}{part['ratio']:7.2f}"
        )
    print(f"{'':16}{full['ours_mfu']:10.1%}{full['theirs_mfu']:10.1%} of its speed at matrix products (MFU)")
    ours, theirs = full["ours_peak_bytes"] / 2**30, full["theirs_peak_bytes"] / 2**30
    print(f"{'':16}{ours:10.2f}{theirs:10.2f} {'GiB at the peak':18}{ours / theirs:7.2f}")
    ours, theirs = memory["ours_bytes"] / 2**30, memory["theirs_bytes"] / 2**30
    print(f"{'V = 128,256':16}{ours:10.2f}{theirs:10.2f} {'GiB at the peak':18}{result['peak_memory_ratio']:7.2f}")
    steps = result["loss_curves"]["steps"]
    print(f"{'loss curves':16}differ by at most {result['loss_difference']:.1e} over {steps} steps")
    for row in result["what_each_brings"]:
        print(f"  {row['layout']:20}{row['seconds']:8.2f} s a step, {row['times_the_one_before']:.2f} times faster")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.bench",
        description="Our training step against transformers', on the same weights and data.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="DIR", help="folder or hub id of a Llama")
    model.add_argument("--shape", default="smollm2-135m", help="a known shape, weights from --seed (smollm2-135m)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (the model's, or demo/L's)")
    parser.add_argument("--pairs", nargs="+", metavar="FILE", help="sentence pairs (the built-in sample)")
    parser.add_argument("--source", default="ja", help="language code of the source side (ja)")
    parser.add_argument("--target", default="en", help="language code of the target side (en)")
    parser.add_argument("--prompt", default="paper", help="a built-in prompt's name or a TOML file (paper)")
    for name, default, text in (
        ("rounds", 7, "steps of each kind that are timed"),
        ("batch-size", 16, "pairs of a timed step"),
        ("steps", 100, "steps of the loss curves"),
        ("curve-batch-size", 4, "pairs of a step of the loss curves"),
        ("sequences", 4, "full sequences of a step"),
        ("length", 256, "tokens of a full sequence"),
        ("threads", 0, "of a system on the CPU; 0: PyTorch's choice"),
        ("seed", 0, "of weights and order"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate (2e-5, the paper's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (train/results)")
    options = parser.parse_args(argv)
    for name in ("rounds", "batch_size", "steps", "curve_batch_size", "sequences", "length", "threads"):
        least = 0 if name == "threads" else 1
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}")
    options.device = str(pick_device(options.device))
    result = measure(options)
    path = save(result, options.output)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    print(f"saved as {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
