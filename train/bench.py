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
import json
import multiprocessing
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import Pairs, Prompt, read_pairs, sample
from kernels.bench import device_name, versions
from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.chat import chat_format
from minillama.config import read_config
from minillama.device import pick_device
from minillama.errors import exit_code
from minillama.weights import resolve_folder
from train.bench_worker import LAYOUTS, Setup, serve
from train.config import Parser
from train.data import Example, responses
from train.plan import SHAPES

DEMO_TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "L"
# A small model with Llama 3's vocabulary, whose logits outweigh all else.
WIDE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
EXAMPLES = """examples:
  python -m train.bench                                     SmolLM2-135M's shape, built-in pairs; about half an hour
  python -m train.bench --steps 10 --rounds 2 --json        some minutes
  python -m train.bench --model DIR --pairs train.de.gz train.en.gz --source de --target en
"""


class Worker:
    """A system in its own process; closed when its block ends."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, setup), daemon=True)
        self.process.start()
        other.close()
        self._answer()

    def step(self, examples: Sequence[Example], layout: str = LAYOUTS[-1]) -> tuple[float, float]:
        """(seconds, loss) of one optimizer step."""
        self.connection.send(("step", examples, layout))
        return self._answer()

    def peak(self) -> int:
        self.connection.send(("peak",))
        return self._answer()

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError("a system under test ended early; its own message is above") from None


@contextmanager
def both(options: argparse.Namespace, folder: str) -> Iterator[tuple[Worker, Worker]]:
    workers: list[Worker] = []
    try:
        for system in ("ours", "theirs"):
            setup = Setup(system, folder, options.device, options.dtype, options.threads, options.lr)
            workers.append(Worker(setup))
        yield workers[0], workers[1]
    finally:
        for worker in workers:
            worker.close()


def full_sequences(workers: tuple[Worker, Worker], config: LlamaConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Speed where nothing can be left out."""
    seconds: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(options.seed)
    for number in range(options.rounds + 1):
        shape = (options.sequences, options.length + 1)
        rows = torch.randint(0, config.vocab_size, shape, generator=generator).tolist()
        examples = [Example(row, 1) for row in rows]
        pair = [worker.step(examples)[0] for worker in workers]
        if number:  # the first step warms up
            seconds.append((pair[0], pair[1]))
            _say(f"full sequences: step {number} of {options.rounds}, {pair[0]:.2f} s and {pair[1]:.2f} s")
    tokens = options.sequences * options.length
    return {"sequences": options.sequences, "length": options.length, **_speeds(seconds, [tokens] * len(seconds))}


def sentence_pairs(
    workers: tuple[Worker, Worker], examples: Sequence[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Speed in target tokens, and the two loss curves."""
    generator = np.random.default_rng(options.seed)
    order = np.concatenate([generator.permutation(len(examples)) for _ in range(_epochs(options, len(examples)))])
    seconds, targets, ours, theirs = [], [], [], []
    for step in range(options.steps):
        batch = [examples[i] for i in order[step * options.batch_size : (step + 1) * options.batch_size]]
        (our_seconds, our_loss), (their_seconds, their_loss) = (worker.step(batch) for worker in workers)
        ours.append(our_loss)
        theirs.append(their_loss)
        if step or options.steps == 1:
            seconds.append((our_seconds, their_seconds))
            targets.append(sum(example.targets for example in batch))
        losses, times = f"{our_loss:.5f} and {their_loss:.5f}", f"{our_seconds:.2f} s and {their_seconds:.2f} s"
        _say(f"pairs: step {step + 1} of {options.steps}, loss {losses}, {times}")
    difference = max(abs(one - other) for one, other in zip(ours, theirs))
    return {
        "batch_size": options.batch_size,
        "steps": options.steps,
        "tokens_per_example": statistics.mean(len(example.tokens) for example in examples),
        "targets_per_example": statistics.mean(example.targets for example in examples),
        "loss_difference": difference,
        "losses_ours": ours,
        "losses_theirs": theirs,
        **_speeds(seconds, targets),
    }


def what_each_brings(worker: Worker, examples: Sequence[Example], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our step on the same batches, one measure more each time; speed over the measure before."""
    generator = np.random.default_rng(options.seed)
    seconds: list[list[float]] = []
    for _ in range(options.rounds):
        batch = [examples[i] for i in generator.permutation(len(examples))[: options.batch_size]]
        seconds.append([worker.step(batch, layout)[0] for layout in LAYOUTS])
        _say("what each brings: " + ", ".join(f"{name} {s:.2f} s" for name, s in zip(LAYOUTS, seconds[-1])))
    columns = list(zip(*seconds))
    gains = [1.0, *(statistics.median(a / b for a, b in zip(one, other)) for one, other in pairwise(columns))]
    return [
        {"layout": name, "seconds": statistics.median(column), "times_the_one_before": gain}
        for name, column, gain in zip(LAYOUTS, columns, gains)
    ]


def large_vocabulary(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory over two steps of full sequences, weights and optimizer included."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.randint(0, WIDE.vocab_size, (options.sequences, options.length + 1), generator=generator).tolist()
    peaks = []
    with both(options, folder) as workers:
        for worker in workers:
            for _ in range(2):
                worker.step([Example(row, 1) for row in rows])
            peaks.append(worker.peak())
    return {
        "vocabulary": WIDE.vocab_size,
        "tokens": options.sequences * options.length,
        "ours_bytes": peaks[0],
        "theirs_bytes": peaks[1],
    }


def _speeds(seconds: Sequence[tuple[float, float]], counts: Sequence[int]) -> dict[str, float]:
    return {
        "ours_per_second": statistics.median(n / one for n, (one, _) in zip(counts, seconds)),
        "theirs_per_second": statistics.median(n / other for n, (_, other) in zip(counts, seconds)),
        "ratio": statistics.median(other / one for one, other in seconds),
    }


def _epochs(options: argparse.Namespace, count: int) -> int:
    return -(-options.steps * options.batch_size // count)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, config = _model(options, Path(temporary))
        examples = _examples(options, config, folder)
        with both(options, folder) as workers:
            # before the steps at random tokens: those would move the weights
            pairs = sentence_pairs(workers, examples, options)
            brings = what_each_brings(workers[0], examples, options)
            full = full_sequences(workers, config, options)
        wide = Path(temporary) / "wide"
        Llama(WIDE).init_weights(options.seed).save_pretrained(wide)
        memory = large_vocabulary(str(wide), options)
    return {
        "tokens_per_second_ratio": full["ratio"],
        "target_tokens_per_second_ratio": pairs["ratio"],
        "peak_memory_ratio": memory["ours_bytes"] / memory["theirs_bytes"],
        "loss_difference": pairs["loss_difference"],
        "full_sequences": full,
        "sentence_pairs": pairs,
        "what_each_brings": brings,
        "large_vocabulary": memory,
        "model": options.model or options.shape,
        "dtype": options.dtype,
        "device": device_name() if options.device != "cpu" else f"cpu, {options.threads or torch.get_num_threads()}",
        "versions": versions() | {"transformers": _transformers_version()},
    }


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


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
    most = max(options.steps, options.rounds) * options.batch_size
    pairs = Pairs(pairs.source[:most], pairs.target[:most], 0, pairs.origin)
    languages = (options.source, options.target) if options.pairs else ("ja", "en")
    prompt, chat = Prompt.load(options.prompt), chat_format("auto", tokenizer)
    eos = config.eos_token_id[0] if config.eos_token_id else None
    return responses(pairs, languages, prompt, chat, tokenizer, config.bos_token_id, eos)


def show(result: dict[str, Any]) -> None:
    full, pairs, memory = result["full_sequences"], result["sentence_pairs"], result["large_vocabulary"]
    print(f"{result['model']}, {result['dtype']}, {result['device']}; ours, transformers, ours over theirs")
    for name, part, what in (("full sequences", full, "tokens/s"), ("sentence pairs", pairs, "target tokens/s")):
        print(
            f"{name:16}{part['ours_per_second']:10.1f}{part['theirs_per_second']:10.1f} {what:18}{part['ratio']:7.2f}"
        )
    ours, theirs = memory["ours_bytes"] / 2**30, memory["theirs_bytes"] / 2**30
    print(f"{'V = 128,256':16}{ours:10.2f}{theirs:10.2f} {'GiB at the peak':18}{result['peak_memory_ratio']:7.2f}")
    print(f"{'loss curves':16}differ by at most {result['loss_difference']:.1e} over {pairs['steps']} steps")
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
        ("steps", 100, "optimizer steps on pairs"),
        ("batch-size", 16, "pairs of a step"),
        ("rounds", 5, "steps on full sequences, and batches on which each measure is timed"),
        ("sequences", 4, "full sequences of a step"),
        ("length", 256, "tokens of a full sequence"),
        ("threads", 0, "of a system on the CPU; 0: PyTorch's choice"),
        ("seed", 0, "of weights and order"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate (2e-5, the paper's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    options = parser.parse_args(argv)
    for name in ("steps", "batch_size", "rounds", "sequences", "length"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    options.device = str(pick_device(options.device))
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
