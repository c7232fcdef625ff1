"""Text from wherever a command line names it: files, standard input, named splits and the built-in sample."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from corpora import hub
from corpora.pairs import Pairs, read_pair_files
from corpora.text import Texts, display_name, read_lines
from minillama.errors import InputError


def read_pairs(
    files: Sequence[str | Path] | str | Path,
    source: str,
    target: str,
    *,
    seed: int | None = None,
    folder: str | Path | None = None,
) -> Pairs:
    """Read pairs in the direction source -> target (language codes).

    files: one TSV (source, target), JSON lines, parquet or arrow file; or two line-aligned text files, source first; or
    one named split such as `alt:ja-en:train` or `wmt19:en-de:test`. '-' is a TSV on standard input. Records of JSON
    lines, parquet and arrow have the keys `source` and `target` or the two codes, at the top or under `translation`.
    A TSV may begin with a header line of the two codes, in either order.
    seed: of a named split's random sample.   folder: a local copy of named splits in the hub's layout.
    Raises InputError that names file and line.
    """
    files = [files] if isinstance(files, (str, Path)) else list(files)
    if len(files) == 1 and hub.is_named_split(str(files[0])):
        return hub.load_pairs(str(files[0]), source, target, seed=seed, folder=folder)
    return read_pair_files(files, source, target)


def read_texts(paths: Sequence[str | Path] | str | Path, *, seed: int | None = None) -> Texts:
    """Read monolingual text for continued pre-training: one document per line, blank lines dropped and counted.

    Each path is a text file, '-' for standard input, or one side of a named split such as `alt:ja-en:cpt:ja` (see
    corpora.hub; `seed` is that of its random sample). Raises InputError that names file and line.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    documents: list[str] = []
    dropped = 0
    details: dict[str, object] = {}
    for path in paths:
        if hub.is_named_split(str(path)):
            split = hub.load_texts(str(path), seed=seed)
            documents += split.documents
            dropped += split.dropped
            details |= split.details
            continue
        lines = read_lines(path)
        filled = [line for line in lines if line.strip()]
        documents += filled
        dropped += len(lines) - len(filled)
    return Texts(documents, dropped, " + ".join(display_name(path) for path in paths), details)


def sample(source: str = "ja", target: str = "en") -> Pairs:
    """40 everyday sentences of the Tanaka corpus (CC BY 2.0 FR), Japanese and English, in either direction."""
    if {source, target} != {"ja", "en"}:
        raise InputError(f"the built-in sample has Japanese (ja) and English (en), not {source} and {target}")
    with resources.as_file(resources.files("corpora").joinpath("sample")) as folder:
        pairs = read_pair_files([folder / f"tanaka.{source}", folder / f"tanaka.{target}"], source, target)
    return Pairs(pairs.source, pairs.target, pairs.dropped, f"built-in sample (Tanaka corpus, {source}-{target})")
