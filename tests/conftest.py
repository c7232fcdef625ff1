"""For every test: no hub, and small models that the rooms above `minillama` share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

from dataclasses import replace
from pathlib import Path

import pytest

from corpora import Prompt, sample
from minillama import Llama, LlamaConfig, Tokenizer
from minillama.files import atomic_folder
from minillama.weights import write_model
from train.bpe import train_bpe

TINY = LlamaConfig(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=(1,),
)


def tiny_model(seed: int, **fields) -> Llama:
    """A random model whose logits spread over several nats, so that a greedy choice is seldom a near tie."""
    return Llama(replace(TINY, **fields)).init_weights(seed, std=0.25).eval()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE of 400 entries over the built-in sample."""
    pairs = sample()
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([*pairs.source, *pairs.target], TINY.vocab_size, ["English", "Japanese"], folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """Folders of three random models over one tokenizer, two with the plain prompt, B with none of its own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    for seed, name in enumerate(("A", "B", "C")):
        with atomic_folder(root / name) as folder:
            write_model(tiny_model(seed), folder)
            tokenizer.save(folder)
            if name != "B":
                Prompt.load("plain").save(folder)
    return {name: root / name for name in ("A", "B", "C")}
