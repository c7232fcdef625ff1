"""What is measured: models by name of their shape with random weights, or folders; prompts; the work of one step.

Widths are those of the published configurations (huggingface.co/HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B).
Random weights take as long as trained ones, and their greedy choices are seldom close: a difference shows.
"""

# B rows  L layers  D model width  H query heads  K key/value heads  C head width  F feed-forward width  V vocabulary

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from corpora import Prompt
from corpora.prompts import FILE_NAME
from decode.engine.expression import parse
from minillama import Llama, LlamaConfig, Tokenizer
from minillama.chat import chat_format, render, stop_tokens
from minillama.config import RopeScaling, read_config
from minillama.files import resolve_folder

DEMO = Path(__file__).resolve().parent.parent / "demo"
DEMO_MEMBERS = ("L", "S_base", "S_mt", "S_src", "S_tgt")
DEMO_COMBINE = "L + S_src + S_tgt"
SMOLLM2_135M = LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 100_000.0, tie_word_embeddings=True)
LLAMA32_1B = LlamaConfig(
    128_256,
    2048,
    8192,
    16,
    32,
    8,
    64,
    131_072,
    1e-5,
    500_000.0,
    RopeScaling(32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
)
SHAPES = {
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": replace(
        SMOLLM2_135M,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "llama-3.2-1b": LLAMA32_1B,
    "llama-3.2-3b": replace(LLAMA32_1B, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
    "tiny": LlamaConfig(400, 32, 48, 2, 4, 2, 8, 512, tie_word_embeddings=True),
}
# Above this the weights are written in bfloat16: every system then reads the same file, in the dtype that it is given.
FLOAT32_PARAMETERS, TINY_PARAMETERS = 500_000_000, 1_000_000
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Models:
    """Members by name: a folder each, and weights by the expression; `shape` names what they are.

    random: their weights are random ones; such models read no text.
    """

    shape: str
    folders: dict[str, str]
    combine: str
    random: bool = False

    def configs(self) -> list[LlamaConfig]:
        return [read_config(Path(folder)) for folder in self.folders.values()]

    def combined(self, combine: str | None) -> "Models":
        """The models that an expression names, its own expression for None; raises InputError for one that is bad."""
        combine = combine or self.combine
        names = set(re.findall(r"[^\W\d]\w*", combine))
        used = {name: folder for name, folder in self.folders.items() if name in names}
        parse(combine, used)
        return replace(self, folders=used, combine=combine)

    def first(self, members: int) -> "Models":
        """The first `members` models, added with weight one."""
        folders = dict(list(self.folders.items())[:members])
        return replace(self, folders=folders, combine=" + ".join(folders))


def prepare(specs: Sequence[str], members: int, work: Path) -> Models:
    """Models from `--model` arguments, random ones written under `work`.

    specs: one name of a shape (then `members` models of it with different seeds), `demo`, or folders, each with
    `NAME=` before it or not. Raises InputError for a name that is neither a shape nor a folder.
    """
    if len(specs) == 1 and specs[0] in SHAPES:
        folders = {f"M{seed}": str(random_folder(specs[0], seed, work)) for seed in range(members)}
        return Models(specs[0], folders, " + ".join(folders), random=True)
    if list(specs) == ["demo"]:
        folders = {name: str(DEMO / name) for name in DEMO_MEMBERS}
        return Models("demo", folders, DEMO_COMBINE)
    folders = {}
    random = False
    for number, spec in enumerate(specs):
        name, _, place = spec.rpartition("=")
        if place in SHAPES:
            random = True
            folders[name or f"M{number}"] = str(random_folder(place, number, work))
        else:
            folders[name or f"M{number}"] = str(resolve_folder(place).resolve())
    shape = "+".join(dict.fromkeys(Path(folder).name.rsplit("-seed", 1)[0] for folder in folders.values()))
    return Models(shape, folders, " + ".join(folders), random)


def random_folder(shape: str, seed: int, work: Path) -> Path:
    """A folder with random weights of a shape; one that `work` already holds is used again."""
    folder = work / f"{shape}-seed{seed}"
    if not (folder / "config.json").exists():
        random_model(SHAPES[shape], seed).save_pretrained(folder)
        write_numbered_tokenizer(folder, SHAPES[shape].vocab_size)
    return folder


def random_model(config: LlamaConfig, seed: int) -> Llama:
    """Random weights: float32 on the CPU, of a large model bf16, and on a GPU where there is one."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Llama(config).parameters())
    if parameters < FLOAT32_PARAMETERS:
        # A wider spread than a fresh model's for the tiny one: its few layers leave the logits close to each other.
        return Llama(config).init_weights(seed, std=0.25 if parameters < TINY_PARAMETERS else 0.02)
    if not torch.cuda.is_available():
        return Llama(config).init_weights(seed).to(torch.bfloat16)
    with torch.device("cuda"):  # seconds there, minutes on the host
        model = Llama(config).to(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if name.endswith("norm.weight") else parameter.data.normal_(
            0, 0.02, generator=generator
        )
    return model


def write_numbered_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer whose id 7 is the word `t7`: the converters of other systems refuse a model without one."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers.models import WordLevel

    words = {f"t{index}": index for index in range(size)}
    HuggingFaceTokenizer(WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_prompts(vocabulary: int, count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def sentence_prompts(
    models: Models, sentences: Sequence[str], source: str, target: str
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Every member's prompts of the sentences, in its folder's prompt or the paper's, and what ends a translation."""
    prompts: dict[str, list[list[int]]] = {}
    stops: set[int] = set()
    for name, place in models.folders.items():
        folder = Path(place)
        tokenizer = Tokenizer.from_pretrained(folder)
        prompt = Prompt.load(folder if (folder / FILE_NAME).exists() else "paper")
        chat = chat_format(prompt.chat, tokenizer)
        config = read_config(folder)
        prompts[name] = [
            render(prompt.messages(sentence, source, target), chat, tokenizer, config.bos_token_id)
            for sentence in sentences
        ]
        stops |= {*config.eos_token_id, *stop_tokens(chat, tokenizer)}
    return prompts, sorted(stops)


def step_work(configs: Sequence[LlamaConfig], dtype: str, batch: int, context: float) -> tuple[float, float]:
    """Bytes read and floating-point operations of one step of all members, `context` positions in every row's cache.

    Weights of all products are read once and used B times; caches are read once, in bfloat16 beside int8 weights. The
    row of the embedding, norms and activations are left out: less than a thousandth.
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


def resident_bytes(configs: Sequence[LlamaConfig], dtype: str) -> float:
    """What a process that holds the models needs while it loads: the weights, half of them once more, its libraries."""
    return 1.5 * step_work(configs, dtype, 0, 0)[0] + (1 << 30)
