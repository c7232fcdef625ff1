"""Random Llamas of every kind, built by transformers, for the tests of this folder."""

import random

import pytest
import torch


def random_llama_config(seed: int, **fixed):
    """A small random configuration in all settings that a Llama has, as transformers' LlamaConfig."""
    from transformers import LlamaConfig

    rng = random.Random(seed)
    kv_heads = rng.choice([1, 1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4])
    head_dim = rng.choice([4, 6, 10, 16, 18])
    settings = {
        "vocab_size": rng.choice([97, 128, 211]),
        "hidden_size": heads * (36 // heads + rng.choice([0, 1, 2])),  # transformers needs a multiple of the heads
        "intermediate_size": rng.choice([29, 48, 64]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.4,
        "mlp_bias": rng.random() < 0.4,
        "bos_token_id": 1,
        "eos_token_id": rng.choice([2, [2, 5, 7]]),
    }
    rope = {"rope_theta": rng.choice([10000.0, 500.0, 500000.0]), "rope_type": "default"}
    if rng.random() < 0.6:
        rope |= {"rope_type": "llama3", "factor": rng.choice([4.0, 8.0, 32.0]), "low_freq_factor": 1.0}
        rope["high_freq_factor"] = rng.choice([4.0, 2.0, 16.0])
        # So short that wavelengths lie on both sides of the ramp and on it.
        rope["original_max_position_embeddings"] = rng.choice([16, 32, 64])
    return LlamaConfig(**{**settings, "rope_parameters": rope, **fixed})


def random_llama(seed: int, **fixed):
    """A LlamaForCausalLM with weights so large that every one affects the logits, biases and norms included."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM._from_config(random_llama_config(seed, **fixed), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model


@pytest.fixture(scope="session")
def random_model():
    return random_llama


@pytest.fixture(scope="session")
def random_config():
    return random_llama_config
