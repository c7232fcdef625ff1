"""Our training step against transformers': `python -m benchmarks.train [--json]`.

Both systems start from the same weights and take the same steps of fused AdamW, alternately, each in its own process:

    full sequences      tokens/s where every token is a label and nothing is padded
    sentence pairs      target tokens/s with the paper's prompt and random batches: transformers pads, we pack
    large vocabulary    peak memory of a small model with 128,256 entries
    loss curves         largest difference of the two losses over the same steps

A ratio of speeds is the median over steps of one system's speed over the other's in the same step.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import header, save
from corpora import Prompt, sample
from minillama.chat import chat_format
from minillama.cli import Parser
from minillama.config import LlamaConfig, read_config
from minillama.errors import InputError, exit_code
from minillama.files import resolve_folder
from minillama.machine import pick_device
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from train.data import responses
from train.memory import shape_of
from train.packing import Example, pack
from train.trainer import target_loss

DEMO_TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "L"
# A small model with Llama 3's vocabulary, whose logits take more memory than all else: V, D, F, layers, H, K, C.
WIDE = LlamaConfig(128_256, 256, 768, 4, 4, 2, 64, tie_word_embeddings=True)
EXAMPLES = """examples:
  python -m benchmarks.train                                  SmolLM2-135M's shape, built-in pairs; about 20 minutes
  python -m benchmarks.train --shape llama-3.2-1b --dtype bfloat16 --sequences 8 --length 2048     on a GPU
"""


class Ours:
    """A model, and `loss(examples)`: the mean over all their labels."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model = Llama.from_pretrained(folder, dtype=dtype, device=device)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        return target_loss(self.model, pack(examples).to(self.model.device)) / sum(e.num_labels for e in examples)


class Transformers:
    """transformers' own model and loss, as its Trainer calls them: padded to the longest, labels -100 elsewhere."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        nn.Module.to(self.model, device)
        # it would give no gradient to the pad token, which in SmolLM2 is also the end of every turn
        embedding: Any = self.model.get_input_embeddings()
        embedding.padding_idx = None

    def loss(self, examples: Sequence[Example]) -> Tensor:
        width = max(len(example.tokens) for example in examples)
        ids_BT = torch.zeros(len(examples), width, dtype=torch.int64)
        mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
        for row, example in enumerate(examples):
            length = len(example.tokens)
            ids_BT[row, :length], mask_BT[row, :length] = torch.tensor(example.tokens), 1
            labels_BT[row, example.prompt_len : length] = ids_BT[row, example.prompt_len : length]
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return self.model(**batch, use_cache=False).loss


# The system and the optimizer of this worker.
RUNNING = threading.local()


def start(system_type: type[Ours | Transformers], folder: Path, options: argparse.Namespace) -> None:
    os.dup2(2, 1)  # standard output to standard error: warnings of libraries are not the benchmark's output
    torch.manual_seed(0)
    system = system_type(folder, getattr(torch, options.dtype), torch.device(options.device))
    optimizer = torch.optim.AdamW(system.model.train().parameters(), lr=options.lr, fused=True)
    RUNNING.system, RUNNING.optimizer = system, optimizer


def step(examples: Sequence[Example]) -> tuple[float, float]:
    """(seconds, loss) of one optimizer step."""
    system, optimizer, started = RUNNING.system, RUNNING.optimizer, time.perf_counter()
    loss = system.loss(examples)
    loss.backward()
    nn.utils.clip_grad_norm_(system.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())  # waits for the device
    return time.perf_counter() - started, value


def take_peak() -> int:
    """Peak memory in bytes since the previous call: the allocator's on a GPU, else the process's (proc(5), VmHWM)."""
    if RUNNING.system.model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


@contextmanager
def both_systems(folder: Path, options: argparse.Namespace) -> Iterator[list[ProcessPoolExecutor]]:
    """Ours and transformers, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    arguments = [(system, folder, options) for system in (Ours, Transformers)]
    ours, theirs = (ProcessPoolExecutor(1, context, initializer=start, initargs=some) for some in arguments)
    with ours, theirs:
        yield [ours, theirs]


def on_each(workers: Sequence[ProcessPoolExecutor], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The function's results in both processes, one after the other, so that they do not compete."""
    return [worker.submit(function, *arguments).result() for worker in workers]


def compare_speed(
    name: str, workers: Sequence[ProcessPoolExecutor], batches: Iterator[list[Example]]
) -> dict[str, Any]:
    """Medians of both systems' labels per second and of their ratio, and peak memory; the first step warms up."""
    speeds: list[tuple[float, float]] = []
    on_each(workers, take_peak)  # the memory of loading is not training's
    for number, batch in enumerate(batches):
        (ours, _), (theirs, _) = on_each(workers, step, batch)
        labels = sum(example.num_labels for example in batch)
        speeds.append((labels / ours, labels / theirs))
        print(f"{name}: step {number}, {ours:.2f} s and {theirs:.2f} s", file=sys.stderr, flush=True)
    peaks, timed = on_each(workers, take_peak), speeds[1:]
    return {
        "ours_per_second": statistics.median(ours for ours, _ in timed),
        "theirs_per_second": statistics.median(theirs for _, theirs in timed),
        "ratio": statistics.median(ours / theirs for ours, theirs in timed),
        "ours_peak_bytes": peaks[0],
        "theirs_peak_bytes": peaks[1],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, wide = Path(temporary) / "model", Path(temporary) / "wide"
        Llama(WIDE).init_weights(0).save_pretrained(wide)
        if options.model:
            folder = resolve_folder(options.model)
        else:
            Llama(shape_of(options.shape)).init_weights(0).save_pretrained(folder)
        config = read_config(folder)
        tokenizer = Tokenizer.from_pretrained(folder if options.model else DEMO_TOKENIZER)
        rules = Prompt.load(options.prompt), chat_format("auto", tokenizer), tokenizer, config.bos_token_id
        pairs = responses(sample(), ("ja", "en"), *rules, config.eos_token_id[0] if config.eos_token_id else None)
        curve = _batches(pairs, options.curve_batch_size, options.steps)
        timed = _batches(pairs, options.batch_size, options.rounds + 1)
        full = _random_sequences(config, options, options.rounds + 1)
        with both_systems(folder, options) as workers:
            losses = [[loss for _, loss in on_each(workers, step, batch)] for batch in curve]
            sentence_pairs = compare_speed("pairs", workers, timed)
            full_sequences = compare_speed("full sequences", workers, full)
        with both_systems(wide, options) as workers:
            large_vocabulary = compare_speed("large vocabulary", workers, _random_sequences(WIDE, options, 2))
    return {
        **header("transformers"),
        "model": Path(options.model or options.shape).name,
        "dtype": options.dtype,
        "tokens_per_second_ratio": full_sequences["ratio"],
        "target_tokens_per_second_ratio": sentence_pairs["ratio"],
        "peak_memory_ratio": large_vocabulary["ours_peak_bytes"] / large_vocabulary["theirs_peak_bytes"],
        "loss_difference": max(abs(ours - theirs) for ours, theirs in losses),
        "full_sequences": full_sequences,
        "sentence_pairs": sentence_pairs,
        "large_vocabulary": large_vocabulary,
        "losses": losses,
    }


def _batches(examples: Sequence[Example], size: int, count: int) -> Iterator[list[Example]]:
    """Random batches, each example once before any comes twice."""
    epochs = -(-count * size // len(examples))
    order = [index for epoch in range(epochs) for index in np.random.default_rng(epoch).permutation(len(examples))]
    for start in range(0, count * size, size):
        yield [examples[index] for index in order[start : start + size]]


def _random_sequences(config: LlamaConfig, options: argparse.Namespace, count: int) -> Iterator[list[Example]]:
    """Batches of full sequences in which every token but the first is a label."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randint(config.vocab_size, (options.sequences, options.length + 1), generator=generator)
        yield [Example(row, 1) for row in rows.tolist()]


def main(argv: Sequence[str] | None = None) -> int:
    description = "Our training step against transformers', on the same weights and data."
    parser = Parser(prog="python -m benchmarks.train", description=description, epilog=EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print all figures, not only the four ratios")
    parser.add_argument("--model", metavar="DIR", help="folder or hub id of a Llama, instead of --shape")
    parser.add_argument("--shape", default="smollm2-135m", help="a shape that train.plan knows, weights from --seed")
    parser.add_argument("--prompt", default="paper", help="a built-in prompt's name or a TOML file (paper)")
    for name, default, text in (
        ("rounds", 7, "timed steps of each kind"),
        ("batch-size", 16, "pairs of a timed step"),
        ("steps", 100, "steps of the loss curves"),
        ("curve-batch-size", 4, "pairs of a step of the loss curves"),
        ("sequences", 4, "full sequences of a step"),
        ("length", 256, "tokens of a full sequence"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate (2e-5, the paper's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    parser.add_argument("--output", type=Path, help="folder of the results (benchmarks/results/train)")
    options = parser.parse_args(argv)
    sizes = options.rounds, options.batch_size, options.steps, options.curve_batch_size, options.sequences
    if min(*sizes, options.length) < 1:
        raise InputError("--rounds, --batch-size, --steps, --curve-batch-size, --sequences, --length must be above 0")
    options.device = str(pick_device(options.device))
    result = measure(options)
    path = save(result, "train", options.output)
    shown = result if options.json else {name: value for name, value in result.items() if isinstance(value, float)}
    print(json.dumps(shown, indent=1))
    print(f"saved as {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
