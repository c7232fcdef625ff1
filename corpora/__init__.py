"""Parallel and monolingual text: readers, the paper's splits, prompts, languages, a built-in sample; no models.

Importing it is cheap: pyarrow, sacrebleu and the hub's client are imported by the functions that use them.
"""

from corpora.languages import LANGUAGES, language_code, language_name
from corpora.pairs import Pairs
from corpora.prompts import Prompt, prompt_names
from corpora.read import read_pairs, read_texts, sample
from corpora.text import iter_lines, read_lines

__all__ = [
    "LANGUAGES",
    "Pairs",
    "Prompt",
    "iter_lines",
    "language_code",
    "language_name",
    "prompt_names",
    "read_lines",
    "read_pairs",
    "read_texts",
    "sample",
]
