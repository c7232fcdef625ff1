"""A compact Llama in plain PyTorch: model, static KV cache, weights in and out, tokenizers, chat formats.

It does not know translation, training or ensembles. Names are imported on first use (PEP 562), so a command's `--help`
does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minillama.errors import InputError

if TYPE_CHECKING:
    from minillama.cache import KVCache
    from minillama.config import LlamaConfig
    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer

__all__ = ["InputError", "KVCache", "Llama", "LlamaConfig", "Tokenizer"]

_MODULES = {"KVCache": "cache", "Llama": "model", "LlamaConfig": "config", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
