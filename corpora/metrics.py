"""BLEU, chrF and TER of sacrebleu, each with its signature.

BLEU is computed with sacrebleu's default tokenizer `13a`, and for languages written without spaces also with their own:
`ja-mecab`, `zh`, `ko-mecab`. Scores of two tokenizers cannot be compared.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillama.errors import InputError

OWN_TOKENIZERS = {"ja": "ja-mecab", "zh": "zh", "ko": "ko-mecab"}
OPTIONAL_TOKENIZERS = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}


@dataclass(frozen=True)
class TextMetric:
    """A sacrebleu metric with its references; `key` is its name in reports, `label` in tables."""

    key: str
    label: str
    metric: Any


def bleu_tokenizers(target: str | None) -> list[str]:
    """The tokenizers of BLEU for a target language, `13a` first; raises InputError where MeCab is not installed."""
    own = OWN_TOKENIZERS.get((target or "").lower().replace("_", "-").split("-")[0])
    if own is None:
        return ["13a"]
    module = OPTIONAL_TOKENIZERS.get(own)
    if module and importlib.util.find_spec(module) is None:
        if own == "ko-mecab":  # an optional dependency of sacrebleu that we do not require
            return ["13a"]
        raise InputError(f"BLEU with {own} needs MeCab: pip install 'sacrebleu[ja]'")
    return ["13a", own]


def text_metrics(names: Sequence[str], references: Sequence[str], target: str | None) -> list[TextMetric]:
    """The metrics named `bleu`, `chrf`, `chrf++`, `ter`, in the names' order; BLEU once for each tokenizer."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    found: list[TextMetric] = []
    stream = [list(references)]
    for name in names:
        if name == "bleu":
            for tokenizer in bleu_tokenizers(target):
                key = "bleu" if tokenizer == "13a" else f"bleu_{tokenizer.replace('-', '_')}"
                metric = BLEU(tokenize=tokenizer, references=stream)
                found.append(TextMetric(key, f"BLEU {tokenizer}", metric))
        elif name == "chrf":
            found.append(TextMetric("chrf", "chrF2", CHRF(references=stream)))
        elif name == "chrf++":
            found.append(TextMetric("chrf++", "chrF2++", CHRF(word_order=2, references=stream)))
        elif name == "ter":
            found.append(TextMetric("ter", "TER", TER(references=stream)))
    return found
