"""Text from wherever a command line names it: files, standard input, named splits and the built-in sample."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from corpora import hub
from corpora.pairs import Pairs, read_pair_files
from corpora.text import Texts, display_name, read_lines
from minillama.errors import InputError


def read_pairs(files: Sequence[str | Path] | str | Path, source: str, target: str) -> Pairs:
    """Read pairs in the direction source -> target (language codes).

    files: one TSV (source, target), JSON lines, parquet or arrow file; or two line-aligned text files, source first; or
    one named split such as `alt:ja-en:train` or `wmt19:en-de:test`. '-' is a TSV on standard input. Records of JSON
    lines, parquet and arrow have the keys `source` and `target` or the two codes, at the top or under `translation`.
    A TSV may begin with a header line of the two codes, in either order.
    Raises InputError that names file and line.
    """
    files = [files] if isinstance(files, (str, Path)) else list(files)
    if len(files) == 1 and hub.is_named_split(str(files[0])):
        return hub.load_pairs(str(files[0]), source, target)
    return read_pair_files(files, source, target)


def read_texts(paths: Sequence[str | Path] | str | Path) -> Texts:
    """Read monolingual text for continued pre-training: one document per line, blank lines dropped and counted.

    Each path is a text file, '-' for standard input, or one side of a named split such as `alt:ja-en:cpt:ja`.
    Raises InputError that names file and line.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    texts = [hub.load_texts(str(path)) if hub.is_named_split(str(path)) else _read_documents(path) for path in paths]
    documents = [document for text in texts for document in text.documents]
    details = {key: value for text in texts for key, value in text.details.items()}
    return Texts(documents, sum(text.dropped for text in texts), " + ".join(text.origin for text in texts), details)


def _read_documents(path: str | Path) -> Texts:
    lines = read_lines(path)
    documents = [line for line in lines if line.strip()]
    return Texts(documents, len(lines) - len(documents), display_name(path))


def sample(source: str = "ja", target: str = "en") -> Pairs:
    """40 everyday sentences of the Tanaka corpus (CC BY 2.0 FR), Japanese and English, in either direction."""
    if {source, target} != {"ja", "en"}:
        raise InputError(f"the built-in sample has Japanese (ja) and English (en), not {source} and {target}")
    with resources.as_file(resources.files("corpora").joinpath("sample")) as folder:
        pairs = read_pair_files([folder / f"tanaka.{source}", folder / f"tanaka.{target}"], source, target)
    return replace(pairs, origin=f"built-in sample (Tanaka corpus, {source}-{target})")
