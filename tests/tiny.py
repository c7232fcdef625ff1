"""Random models small enough to compare with transformers hundreds of times."""

from dataclasses import replace

import torch

from kernels.cpu.packed_linear import has_float16_product
from minillama import Llama, LlamaConfig

# How a CPU here can hold weights packed.
WEIGHT_DTYPES = ["float32", *(["float16"] if has_float16_product() else []), "bfloat16", "int8"]

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


def random_prompts(seed: int, count: int, shortest=1, longest=24, vocabulary=TINY.vocab_size) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def in_transformers(model: Llama, folder, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def with_noise(model: Llama) -> Llama:
    """The model with norms and biases that are not the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model
