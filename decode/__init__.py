"""Ensemble decoding: several Llamas read their own prompts and choose every next token together.

    from decode import Ensemble, translate
    ensemble = Ensemble({"L": model_l, "S": model_s}, combine="L + 0.5*S")
    result = translate(ensemble, prompts, max_new_tokens=256, batch_size=16)

Nothing here knows how a model was trained.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decode.engine.ensemble import Ensemble as Ensemble
    from decode.engine.generate import Translations as Translations
    from decode.engine.generate import translate as translate

# Imported on first use: a command's --help needs no torch.
_EXPORTS = {"Ensemble": "ensemble", "Translations": "generate", "translate": "generate"}
__all__ = ["Ensemble", "Translations", "translate"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"decode.engine.{_EXPORTS[name]}"), name)
