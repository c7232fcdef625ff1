"""Ensemble decoding: several Llamas read their own prompts and choose every next token together.

    from decode import Ensemble, translate
    ensemble = Ensemble({"L": model_l, "S": model_s}, combine="L + 0.5*S")
    result = translate(ensemble, prompts, max_new_tokens=256, batch_size=16)

Nothing here knows how a model was trained.
"""

from decode.engine.ensemble import Ensemble
from decode.translate import Translations, translate

__all__ = ["Ensemble", "Translations", "translate"]
