"""Parallel and monolingual text: readers, the paper's splits, prompts, a small built-in sample. It knows no models."""

from importlib import resources

from corpora.languages import LANGUAGES, language_name
from corpora.pairs import Pairs, read_pairs
from corpora.prompts import Prompt, prompt_names
from corpora.text import Texts, iter_lines, open_binary, read_lines, read_texts

__all__ = [
    "LANGUAGES",
    "Pairs",
    "Prompt",
    "Texts",
    "iter_lines",
    "language_name",
    "open_binary",
    "prompt_names",
    "read_lines",
    "read_pairs",
    "read_texts",
    "sample",
]


def sample(source: str = "ja", target: str = "en") -> Pairs:
    """40 everyday sentences of the Tanaka corpus (CC BY 2.0 FR), Japanese and English, in either direction."""
    from minillama.errors import InputError

    if {source, target} != {"ja", "en"}:
        raise InputError(f"the built-in sample has Japanese (ja) and English (en), not {source} and {target}")
    folder = resources.files("corpora").joinpath("sample")
    with resources.as_file(folder) as path:
        pairs = read_pairs([path / f"tanaka.{source}", path / f"tanaka.{target}"], source, target)
    return Pairs(pairs.source, pairs.target, pairs.dropped, f"built-in sample (Tanaka corpus, {source}-{target})")
