"""What `train.bench` measures, each part with both systems side by side, one step in turn.

Times are taken inside the systems' processes; a ratio is the median over steps of one system's speed over the other's
in the same step, so what else the machine does falls on both.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from minillama import LlamaConfig
from train.bench_worker import LAYOUTS, Setup, serve
from train.data import Example
from train.memory import linears

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
# Width of the square matrices whose product tells how fast the device multiplies.
ROOF_WIDTH = {"cpu": 2048, "cuda": 8192}


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
        """Bytes, since the call before."""
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
    """Speed where nothing can be left out, and how much of the device's own speed at matrix products that is."""
    seconds: list[tuple[float, float]] = []
    for worker in workers:
        worker.peak()
    for number, examples in enumerate(_random_rows(config, options, options.rounds + 1)):
        pair = [worker.step(examples)[0] for worker in workers]
        if number:  # the first step warms up
            seconds.append((pair[0], pair[1]))
            _say(f"full sequences: step {number} of {options.rounds}, {pair[0]:.2f} s and {pair[1]:.2f} s")
    tokens = options.sequences * options.length
    speeds = _speeds(seconds, [tokens] * len(seconds))
    flops, roof = flops_per_token(config, options.length), products_per_second(options)
    return {
        "sequences": options.sequences,
        "length": options.length,
        **speeds,
        "ours_peak_bytes": workers[0].peak(),
        "theirs_peak_bytes": workers[1].peak(),
        "flops_per_token": flops,
        "roof_flops_per_second": roof,
        "ours_mfu": speeds["ours_per_second"] * flops / roof,
        "theirs_mfu": speeds["theirs_per_second"] * flops / roof,
    }


def flops_per_token(config: LlamaConfig, length: int) -> int:
    """Of forward and backward, for full sequences: three times two per weight of a product, and causal attention's.

    (Narayanan et al., SC 2021, equation 3, without recomputation and with the half of the attention that is seen.)
    """
    weights = config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linears(config).values())
    weights += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length + 1)
    return 6 * (weights + attention)


def products_per_second(options: argparse.Namespace) -> float:
    """Floating point operations per second of one large matrix product in the run's dtype: the best of some."""
    device = torch.device(options.device)
    width = ROOF_WIDTH[device.type]
    one = torch.randn(width, width, device=device).to(getattr(torch, options.dtype))
    seconds = []
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    for _ in range(options.rounds + 3):
        started = time.perf_counter()
        other = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    del one, other
    return 2 * width**3 / min(seconds)


def sentence_pairs(
    workers: tuple[Worker, Worker], examples: Sequence[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Speed in target tokens."""
    seconds, targets = [], []
    for number, batch in enumerate(_batches(examples, options.batch_size, options.rounds + 1, options.seed)):
        one, other = (worker.step(batch)[0] for worker in workers)
        if number:  # the first step warms up
            seconds.append((one, other))
            targets.append(sum(example.targets for example in batch))
            _say(f"pairs: step {number} of {options.rounds}, {one:.2f} s and {other:.2f} s")
    return {
        "batch_size": options.batch_size,
        "steps": options.rounds,
        "tokens_per_example": statistics.mean(len(example.tokens) for example in examples),
        "targets_per_example": statistics.mean(example.targets for example in examples),
        **_speeds(seconds, targets),
    }


def loss_curves(folder: str, examples: Sequence[Example], options: argparse.Namespace) -> dict[str, Any]:
    """The losses of the same steps from the same weights; their time does not count, so the batches are small."""
    losses: list[tuple[float, float]] = []
    with both(options, folder) as workers:
        for batch in _batches(examples, options.curve_batch_size, options.steps, options.seed):
            ours, theirs = (worker.step(batch)[1] for worker in workers)
            losses.append((ours, theirs))
            _say(f"curves: step {len(losses)} of {options.steps}, {ours:.6f} and {theirs:.6f}")
    return {
        "batch_size": options.curve_batch_size,
        "steps": options.steps,
        "difference": max(abs(one - other) for one, other in losses),
        "ours": [one for one, _ in losses],
        "theirs": [other for _, other in losses],
    }


def what_each_brings(worker: Worker, examples: Sequence[Example], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our step on the same batches, one measure more each time; speed over the measure before."""
    seconds: list[list[float]] = []
    for batch in _batches(examples, options.batch_size, options.rounds, options.seed):
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
    peaks = []
    with both(options, folder) as workers:
        for worker in workers:
            for examples in _random_rows(WIDE, options, 2):
                worker.step(examples)
            peaks.append(worker.peak())
    _say(f"large vocabulary: {peaks[0]:,} and {peaks[1]:,} bytes")
    return {
        "vocabulary": WIDE.vocab_size,
        "tokens": options.sequences * options.length,
        "ours_bytes": peaks[0],
        "theirs_bytes": peaks[1],
    }


def _batches(examples: Sequence[Example], size: int, count: int, seed: int) -> Iterator[list[Example]]:
    """Drawn at random, each example once before any comes twice."""
    generator = np.random.default_rng(seed)
    epochs = -(-count * size // len(examples))
    order = np.concatenate([generator.permutation(len(examples)) for _ in range(epochs)])
    for start in range(0, count * size, size):
        yield [examples[index] for index in order[start : start + size]]


def _random_rows(config: LlamaConfig, options: argparse.Namespace, steps: int) -> Iterator[list[Example]]:
    """Full sequences in which every token but the first is a target."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(steps):
        rows = torch.randint(config.vocab_size, (options.sequences, options.length + 1), generator=generator)
        yield [Example(row, 1) for row in rows.tolist()]


def _speeds(seconds: Sequence[tuple[float, float]], counts: Sequence[int]) -> dict[str, float]:
    return {
        "ours_per_second": statistics.median(n / one for n, (one, _) in zip(counts, seconds)),
        "theirs_per_second": statistics.median(n / other for n, (_, other) in zip(counts, seconds)),
        "ratio": statistics.median(other / one for one, other in seconds),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
