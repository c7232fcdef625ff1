"""A compact Llama in plain PyTorch: model, static KV cache, weights in and out, tokenizers, chat formats.

It knows nothing of translation, training or ensembles.
"""

from minillama.cache import KVCache
from minillama.config import LlamaConfig
from minillama.packed_attention import Documents
from minillama.errors import InputError
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

__all__ = ["Documents", "InputError", "KVCache", "Llama", "LlamaConfig", "Tokenizer"]
