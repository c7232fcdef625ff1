"""Decoding against its peers on the machine at hand: `python -m benchmarks.decode [--json]`.

Ours against transformers (eager, the same models, logits summed by hand) and, for a single model, CTranslate2 and
OpenVINO where they are installed (peers.py). Every system has a process of its own and they alternate within one run,
so that neighbours on the machine disturb all of them alike. The time of a step is the median of all steps after the
first few.

What a step reads and computes is counted from the shapes; the shares are of what this machine does at best, measured in
the same run. Only ratios within one run can be compared.
"""

# B sequences

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import StealClock, copy_speed, header, matmul_speed, read_speed, save
from benchmarks.peers import SINGLE, STOP, SYSTEMS, Prompts, Refused, Worker
from corpora import Prompt, read_lines
from decode.engine.expression import parse
from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.chat import chat_format, render, stop_tokens
from minillama.cli import Parser
from minillama.config import RopeScaling, read_config
from minillama.errors import exit_code
from minillama.files import resolve_folder

DEMO = Path(__file__).resolve().parent.parent / "demo"
LLAMA3 = RopeScaling(32.0, 1.0, 4.0, 8192)
# Widths of the published configurations: HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B and -3B.
SHAPES = {
    "smollm2-135m": LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 100_000.0, tie_word_embeddings=True),
    "llama-3.2-1b": LlamaConfig(
        128_256, 2048, 8192, 16, 32, 8, 64, 131_072, 1e-5, 500_000.0, LLAMA3, tie_word_embeddings=True
    ),
    "llama-3.2-3b": LlamaConfig(
        128_256, 3072, 8192, 28, 24, 8, 128, 131_072, 1e-5, 500_000.0, LLAMA3, tie_word_embeddings=True
    ),
    "tiny": LlamaConfig(400, 32, 48, 2, 4, 2, 8, 512, tie_word_embeddings=True),
}
SETTLING = 4  # first steps of a run that are not counted: prefill, and what is made at its first use
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
EXAMPLES = """examples:
  python -m benchmarks.decode                                        SmolLM2's shape, 3 members, B = 1, 4, 16
  python -m benchmarks.decode --members 1 --peers transformers,ctranslate2,openvino
  python -m benchmarks.decode --model llama-3.2-3b --model llama-3.2-1b --model llama-3.2-1b --dtype bfloat16
  python -m benchmarks.decode --model demo --text dev.ja --batch 16,128
  python -m benchmarks.decode --model demo --text dev.ja --batch 1,16 --speculate off,auto,3 --peers ""
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        folders, combine = models(arguments, Path(arguments.work or work))
        run = Run(arguments, folders, combine, notes)
        before = machine(arguments.device)
        if arguments.text:
            rows = run.text()
        else:
            rows = run.steps()
            after = machine(arguments.device)
            best = {name: max(value, after[name]) for name, value in before.items()}
            for row in rows:
                row["share_of_read_bandwidth"] = round(
                    row["gigabytes_per_second"] / best["read_gigabytes_per_second"], 3
                )
                row["share_of_matmul"] = round(row["gigaflops"] / best["matmul_gigaflops"], 3)
            before = best
    report = header("transformers") | {"threads": arguments.threads, "machine": before, "rows": rows, "notes": notes}
    path = save(report, "decode") if arguments.save else None
    if arguments.json:
        print(json.dumps(report))
    else:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items() if name != "tokens"))
    for note in [*notes, *([f"saved in {path}"] if path else [])]:
        print(note, file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="python -m benchmarks.decode", description=__doc__, epilog=EXAMPLES)
    add = result.add_argument
    add(
        "--model",
        action="append",
        help=f"{', '.join(SHAPES)} (random weights), demo, or [NAME=]DIR; default smollm2-135m",
    )
    add("--members", type=int, default=3, help="models of a shape that is given once (default 3)")
    add("--combine", help="the expression (default: the plain sum)")
    add("--dtype", default="float32", help="of our weights, several with commas (default float32)")
    add("--peers", default="transformers", help="systems to compare with (default transformers)")
    add("--peer-dtype", default="float32", help="dtypes of the peers (default float32)")
    add("--batch", default="1,4,16", help="sequences at once, several with commas (default 1,4,16)")
    add("--prompt", type=int, default=32, help="tokens of a prompt (default 32)")
    add("--steps", type=int, default=32, help="steps that are counted (default 32)")
    add("--text", metavar="FILE", help="decode these sentences to their ends instead; the models must have a tokenizer")
    add("--lines", type=int, help="only so many of them")
    add("--max-new-tokens", type=int, default=64, help="of a sentence (default 64)")
    add("--source", default="ja"), add("--target", default="en")
    add("--speculate", default="off", help="settings of speculative decoding, several with commas")
    add("--explain", action="store_true", help="with --text: also with explanations")
    add("--rounds", type=int, default=3, help="repetitions, in which the systems alternate (default 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of every system")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the process's threads")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--work", help="a folder to keep random models in")
    add("--save", action="store_true", help="write the results to benchmarks/results/decode/")
    add("--json", action="store_true")
    return result


class Run:
    """The measurements of one command."""

    def __init__(self, arguments: argparse.Namespace, folders: dict[str, str], combine: str, notes: list[str]) -> None:
        self.arguments, self.folders, self.combine, self.notes = arguments, folders, combine, notes
        self.configs = [read_config(Path(folder)) for folder in folders.values()]
        peers = [name for name in arguments.peers.split(",") if name]
        unknown = [name for name in peers if name not in SYSTEMS]
        if unknown:
            raise InputError(f"--peers {','.join(unknown)}: expected some of {', '.join(SYSTEMS)}")
        self.systems = [("ours", dtype) for dtype in arguments.dtype.split(",")]
        self.systems += [(name, dtype) for name in peers for dtype in arguments.peer_dtype.split(",")]
        self.batches = [int(batch) for batch in arguments.batch.split(",")]

    @contextmanager
    def workers(self, stops: Sequence[int]) -> Iterator[dict[tuple[str, str], Worker]]:
        """Every system that runs here, loaded."""
        found = {}
        with ExitStack() as opened:
            for name, dtype in self.systems:
                if name in SINGLE and len(self.folders) > 1:
                    continue
                where = {"folders": self.folders, "combine": self.combine, "dtype": dtype, "stops": list(stops)}
                options = {"clock": self.arguments.clock, "device": self.arguments.device}
                try:
                    worker = Worker(name, self.arguments.threads, **where, **options)
                except Refused as refusal:
                    self.notes.append(f"{name} {dtype}: {refusal}")
                    continue
                opened.callback(worker.close)
                found[name, dtype] = worker
            yield found

    def steps(self) -> list[dict[str, Any]]:
        """A row for each batch size and system: one batch of prompts of one length, steps after the first ones."""
        new_tokens, rows = SETTLING + self.arguments.steps, []
        with self.workers(()) as workers:
            for batch in self.batches:
                prompts = self.random_prompts(batch)
                step_seconds: dict[tuple[str, str], list[float]] = {system: [] for system in workers}
                steal, tokens = StealClock(), {}
                for worker in workers.values():
                    worker.ask("generate", prompts=prompts, new_tokens=SETTLING, batch=batch)
                for _ in range(self.arguments.rounds):
                    for system, worker in workers.items():
                        result = worker.ask("generate", prompts=prompts, new_tokens=new_tokens, batch=batch)
                        clock = result["clock"][-self.arguments.steps - 1 :]
                        step_seconds[system] += [end - begin for begin, end in pairwise(clock)]
                        tokens[system] = result["tokens"]
                medians = {system: statistics.median(seconds) for system, seconds in step_seconds.items()}
                for system, seconds in medians.items():
                    read, work = step_work(self.configs, system[1], batch, self.arguments.prompt + new_tokens / 2)
                    row = self.row(system, batch, medians, tokens) | {
                        "ms_per_step": round(seconds * 1e3, 3),
                        "tokens_per_second": round(batch / seconds, 1),
                        "gigabytes_per_second": round(read / seconds / 1e9, 2),
                        "gigaflops": round(work / seconds / 1e9, 1),
                        "stolen": steal.share(),
                        "peak_megabytes": workers[system].ask("peak"),
                    }
                    rows.append(row)
        return rows

    def text(self) -> list[dict[str, Any]]:
        """A row for each batch size, system and setting: all sentences, prefill included, models loaded before."""
        arguments, rows = self.arguments, []
        prompts, stops = sentence_prompts(
            self.folders, read_lines(arguments.text)[: arguments.lines], arguments.source, arguments.target
        )
        ours = [{"speculate": mode} for mode in arguments.speculate.split(",")]
        if arguments.explain:
            ours.append({"speculate": "off", "explain": True})
        with self.workers(stops) as workers:
            for batch in self.batches:
                runs = [(s, options) for s in workers for options in (ours if s[0] == "ours" else [{}])]
                seconds: list[list[float]] = [[] for _ in runs]
                results: list[dict[str, Any]] = [{} for _ in runs]
                steal = StealClock()
                for round_number in range(arguments.rounds + 1):  # the first is a warm-up of one batch
                    some = {n: p[:batch] for n, p in prompts.items()} if round_number == 0 else prompts
                    for at, (system, options) in enumerate(runs):
                        how = {"new_tokens": arguments.max_new_tokens, "batch": batch}
                        results[at] = workers[system].ask("generate", prompts=some, **how, **options)
                        if round_number:
                            seconds[at].append(results[at]["seconds"])
                plain = next((at for at, (_, options) in enumerate(runs) if options == ours[0]), 0)
                peer = next((at for at, (system, _) in enumerate(runs) if system[0] == "transformers"), plain)
                for at, (system, options) in enumerate(runs):
                    median, stats = statistics.median(seconds[at]), results[at]["stats"]
                    equal = sum(a == b for a, b in zip(results[at]["tokens"], results[peer]["tokens"]))
                    rows.append(
                        {"system": system[0], "dtype": system[1], "batch": batch, "combine": self.combine, **options}
                        | {
                            "sentences": len(results[at]["tokens"]),
                            "sequences_equal": equal,
                            "seconds": round(median, 3),
                            "seconds_of_rounds": [round(value, 3) for value in seconds[at]],
                            "ratio_to_transformers": round(statistics.median(seconds[peer]) / median, 3),
                            "ratio_to_plain": round(statistics.median(seconds[plain]) / median, 3),
                            "steps": len(results[at]["clock"]),
                            "output_tokens": sum(len(row) - row.count(STOP) for row in results[at]["tokens"]),
                            "proposers": stats.get("proposers", {}),
                            "stolen": steal.share(),
                        }
                    )
        return rows

    def row(
        self, system: tuple[str, str], batch: int, medians: Mapping[tuple[str, str], float], tokens: Mapping[Any, Any]
    ) -> dict[str, Any]:
        """What was run, its speed over transformers' fastest dtype, and how many sequences have its tokens."""
        peers = {other: seconds for other, seconds in medians.items() if other[0] == "transformers"}
        row = {"system": system[0], "dtype": system[1], "batch": batch, "members": len(self.folders)}
        if peers:
            fastest = min(peers, key=lambda peer: peers[peer])
            like = next((peer for peer in peers if peer[1] == system[1]), fastest)
            row["ratio_to_transformers"] = round(peers[fastest] / medians[system], 3)
            row["sequences_equal"] = sum(a == b for a, b in zip(tokens[system], tokens[like]))
        return row

    def random_prompts(self, batch: int) -> Prompts:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, self.arguments.prompt)
        ids = torch.randint(3, self.configs[0].vocab_size, shape, generator=generator).tolist()
        return dict.fromkeys(self.folders, ids)


def models(arguments: argparse.Namespace, work: Path) -> tuple[dict[str, str], str]:
    """Members' folders by name and their expression; random models are written under `work`."""
    specs = arguments.model or ["smollm2-135m"]
    if specs == ["demo"]:
        names = ("L", "S_base", "S_mt", "S_src", "S_tgt") if arguments.combine else ("L", "S_src", "S_tgt")
        folders = {name: str(DEMO / name) for name in names}
    else:
        if len(specs) == 1 and specs[0] in SHAPES:
            specs = specs * arguments.members
        folders = {}
        for number, spec in enumerate(specs):
            name, _, source = spec.rpartition("=")
            folder = random_folder(source, number, work) if source in SHAPES else resolve_folder(source).resolve()
            folders[name or f"M{number}"] = str(folder)
    combine = arguments.combine or " + ".join(folders)
    used = parse(combine, folders, all_used=False)
    return {name: folder for name, folder in folders.items() if name in used}, combine


def random_folder(shape: str, seed: int, work: Path) -> Path:
    """A folder with random weights of a shape and a tokenizer of numbered words, which converters of peers need."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers.models import WordLevel

    folder, config = work / f"{shape}-seed{seed}", SHAPES[shape]
    if (folder / "config.json").exists():
        return folder
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device(device):
        # A wider spread for the tiny shape: its few layers leave the logits close to each other.
        model = Llama(config).init_weights(seed, std=0.25 if shape == "tiny" else 0.02)
    model.to(dtype if config.hidden_size < 1000 else torch.bfloat16).save_pretrained(folder)
    words = {f"t{index}": index for index in range(config.vocab_size)}
    HuggingFaceTokenizer(WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def sentence_prompts(
    folders: Mapping[str, str], sentences: Sequence[str], source: str, target: str
) -> tuple[Prompts, list[int]]:
    """Every member's prompts of the sentences, in its folder's prompt or the paper's, and the stop tokens."""
    prompts: Prompts = {}
    stops: set[int] = set()
    for name, path in folders.items():
        folder = Path(path)
        tokenizer, config = Tokenizer.from_pretrained(folder), read_config(folder)
        prompt = Prompt.load(folder if (folder / "prompt.toml").exists() else "paper")
        chat = chat_format(prompt.chat, tokenizer)
        prompts[name] = [
            render(prompt.messages(sentence, source, target), chat, tokenizer, config.bos_token_id)
            for sentence in sentences
        ]
        stops |= {*config.eos_token_id, *stop_tokens(chat, tokenizer)}
    return prompts, sorted(stops)


def machine(device: str) -> dict[str, float]:
    """What the device reads and computes at best in float32, measured now."""
    read, size = (copy_speed(5), 8192) if device.startswith("cuda") else (read_speed(5), 2048)
    return {
        "read_gigabytes_per_second": read,
        "matmul_gigaflops": matmul_speed(torch.float32, device, 5, size),
    }


def step_work(configs: Sequence[LlamaConfig], dtype: str, batch: int, context: float) -> tuple[float, float]:
    """Bytes read and floating-point operations of one step of all members, `context` positions in every sequence.

    Weights are read once and used B times, caches are read once; norms and activations are below a thousandth.
    """
    item = ITEM_BYTES[dtype]
    read = work = 0.0
    for config in configs:
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        attention = config.hidden_size * (2 * heads + 2 * kv_heads) * width
        layer = attention + 3 * config.hidden_size * config.intermediate_size
        weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
        cached = 2 * config.num_hidden_layers * kv_heads * width * max(item, 2)
        read += weights * item + batch * context * cached
        work += 2 * batch * weights + 4 * batch * context * config.num_hidden_layers * heads * width
    return read, work


if __name__ == "__main__":
    sys.exit(exit_code(main))
