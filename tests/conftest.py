"""For every test: no hub, interpreted Triton without a GPU, and small models that several folders share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, whose own functions it also changes

from hypothesis import settings
from real import smollm2_in
from tiny import TINY, tiny_model

from corpora import Prompt, sample
from minillama import Tokenizer
from minillama.files import atomic_folder
from train.bpe import train_bpe

# How long an example takes is the machine's affair: it may have other work.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models here are so small that a second thread only costs, above all on a machine that has other work.

    For the whole session, so that what a module's fixtures compute is computed as its tests do.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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
            tiny_model(seed).write_files(folder)
            tokenizer.save(folder)
            if name != "B":
                Prompt.load("plain").save(folder)
    return {name: root / name for name in ("A", "B", "C")}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """(folder in Hugging Face's layout, transformers' model), converted from the package's GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    return folder, smollm2_in(folder)
