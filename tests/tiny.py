"""Random models small enough to compare with transformers hundreds of times."""

from dataclasses import replace

from kernels.cpu.packed_linear import has_float16_product
from minillama import Llama, LlamaConfig

# How a CPU here can hold weights packed.
STORAGES = ["float32", *(["float16"] if has_float16_product() else []), "bfloat16", "int8"]

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
