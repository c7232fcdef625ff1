"""The paper's corpora by name: ALT and WMT19, their filters, splits and random samples.

A name is `corpus:pair:split`, with options after commas:

    alt:ja-en:test            wmt19:en-de:train,seed=7          alt:ja-en:dev,dev=500          alt:ja-en:cpt:ja

| split | alt (`mutiyama/alt`, alt-parallel)  | wmt19 (`wmt/wmt19`, de-en)                                  |
|-------|-------------------------------------|-------------------------------------------------------------|
| cpt   | the hub's validation split          | the first 2,000 of a random order of the hub's train split  |
| train | the hub's train split without `dev` | the next 18,000                                             |
| dev   | `dev` random pairs of train         | the 1,000 after those                                       |
| test  | the hub's test split                | the hub's validation split (newstest2018)                   |

Pairs with a blank side are dropped before anything is sampled or counted. The pair's order is the direction; a split
has the same rows in both. A fourth field names the side that continued pre-training reads. `dev` is 0 by default, as in
the paper: ALT's train split is complete and there is no dev split. The paper's seed is not published.

Files come from the hub (or its local cache), or from a folder in the hub's layout, `FOLDER/mutiyama/alt/alt-parallel/`:
the argument `folder` or the environment variable COLLAB_MT_CORPORA.
"""

import bisect
import itertools
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora.pairs import Pairs, drop_blank, is_blank
from corpora.tables import PairTable, open_table
from corpora.text import Texts
from minillama.errors import InputError

DEFAULT_SEED = 0
FOLDER_VARIABLE = "COLLAB_MT_CORPORA"
SPLITS = ("cpt", "train", "dev", "test")
OPTIONS = ("seed", "dev", "revision")
WMT_RANGES = {"cpt": (0, 2_000), "train": (2_000, 20_000), "dev": (20_000, 21_000)}
_NAME = re.compile(r"(?P<corpus>[^:,]+):(?P<source>[^:,-]+)-(?P<target>[^:,-]+):(?P<split>[^:,]+)(:(?P<side>[^:,]+))?")


@dataclass(frozen=True)
class Corpus:
    """A dataset on the hub; `languages` is the one pair that it is used for, empty for all that its table has."""

    repo: str
    config: str
    hub_splits: dict[str, str]
    languages: tuple[str, ...] = ()


CORPORA = {
    "alt": Corpus(
        "mutiyama/alt", "alt-parallel", {"cpt": "validation", "train": "train", "dev": "train", "test": "test"}
    ),
    "wmt19": Corpus(
        "wmt/wmt19", "de-en", {"cpt": "train", "train": "train", "dev": "train", "test": "validation"}, ("de", "en")
    ),
}


@dataclass(frozen=True)
class SplitName:
    """A parsed name of a split."""

    text: str
    corpus: str
    source: str
    target: str
    split: str
    side: str | None
    seed: int
    dev: int
    revision: str | None


def is_named_split(name: str) -> bool:
    """Whether a path argument is the name of a split: it begins with a known corpus and a colon."""
    return name.split(":", 1)[0] in CORPORA and ":" in name


def parse_name(text: str, seed: int | None = None) -> SplitName:
    """Parse a name; `seed` is used where the name has none. Raises InputError that says what would be right."""
    head, *assignments = text.split(",")
    match = _NAME.fullmatch(head)
    if not match:
        raise InputError(f"{text}: expected a name such as alt:ja-en:train or wmt19:de-en:test")
    corpus, source, target, split, side = match.group("corpus", "source", "target", "split", "side")
    if split not in SPLITS:
        raise InputError(f"{text}: unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    known = CORPORA[corpus].languages
    if source == target or (known and {source, target} != set(known)):
        example = "-".join(known) if known else "ja-en"
        raise InputError(f"{text}: {corpus} has no pair {source}-{target}, expected one such as {example}")
    if side not in (None, source, target):
        raise InputError(f"{text}: {side!r} is not a side of {source}-{target}, expected {source} or {target}")
    options: dict[str, str] = {}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in OPTIONS or not value:
            raise InputError(f"{text}: unknown option {assignment!r}, expected one of seed=N, dev=N, revision=COMMIT")
        options[key] = value
    numbers = {"seed": DEFAULT_SEED if seed is None else seed, "dev": 0}
    for key in numbers:
        if key in options:
            if not re.fullmatch(r"[0-9]+", options[key]):
                raise InputError(f"{text}: {key} is {options[key]!r}, expected a whole number")
            numbers[key] = int(options[key])
    if corpus != "alt" and "dev" in options:
        raise InputError(f"{text}: the option dev is for alt, {corpus} has a dev split of its own")
    if corpus == "alt" and split == "dev" and not numbers["dev"]:
        raise InputError(
            f"{text}: the paper leaves alt no dev split; write {text},dev=500 and train on its train,dev=500"
        )
    return SplitName(
        text, corpus, source, target, split, side, numbers["seed"], numbers["dev"], options.get("revision")
    )


def load_pairs(
    text: str, source: str, target: str, *, seed: int | None = None, folder: str | Path | None = None
) -> Pairs:
    """The pairs of a named split, whose direction must be source -> target; see corpora.read.read_pairs."""
    name = parse_name(text, seed)
    if (name.source, name.target) != (source, target):
        right = text.replace(f":{name.source}-{name.target}:", f":{source}-{target}:", 1)
        raise InputError(
            f"{text}: is {name.source} to {name.target}, but {source} to {target} is requested: write {right}"
        )
    if name.side:
        raise InputError(f"{text}: is one side of the pairs, expected both: leave out ':{name.side}'")
    return _load(name, folder)


def load_texts(text: str, *, seed: int | None = None, folder: str | Path | None = None) -> Texts:
    """One side of a named split, for continued pre-training."""
    name = parse_name(text, seed)
    if not name.side:
        raise InputError(
            f"{text}: has two sides, expected one: write {text.split(',')[0]}:{name.source} or :{name.target}"
        )
    pairs = _load(name, folder)
    documents = pairs.source if name.side == name.source else pairs.target
    return Texts(documents, pairs.dropped, text, pairs.details)


def _load(name: SplitName, folder: str | Path | None) -> Pairs:
    corpus = CORPORA[name.corpus]
    files, revision = find_files(corpus, corpus.hub_splits[name.split], folder, name.revision)
    tables = [open_table(file, name.source, name.target) for file in files]
    details: dict[str, object] = {"rows": sum(table.rows for table in tables)}
    if revision:
        details["revision"] = revision
    if name.corpus == "wmt19" and name.split in WMT_RANGES:
        details["seed"] = name.seed
        return _sample_rows(tables, WMT_RANGES[name.split], name, details)
    records = itertools.chain.from_iterable(
        table.pairs(group) for table in tables for group in range(len(table.group_rows))
    )
    pairs = drop_blank(records, name.text, details)
    if name.corpus == "alt" and name.dev and name.split in ("train", "dev"):
        details |= {"seed": name.seed, "dev": name.dev}
        return _split_dev(pairs, name)
    return pairs


def random_order(rows: int, seed: int) -> Iterator[int]:
    """Yield the row numbers 0..rows-1 in random order, each once."""
    generator = random.Random(seed)
    seen: set[int] = set()
    while len(seen) < rows:
        row = generator.randrange(rows)
        if row not in seen:
            seen.add(row)
            yield row


def _sample_rows(
    tables: Sequence[PairTable], bounds: tuple[int, int], name: SplitName, details: dict[str, object]
) -> Pairs:
    """Pairs bounds[0] to bounds[1] - 1 of the random order, in which blank pairs are skipped."""
    rows = sum(table.rows for table in tables)
    order = random_order(rows, name.seed)
    kept: list[tuple[str, str]] = []
    dropped = 0
    while len(kept) < bounds[1]:
        sampled = list(itertools.islice(order, bounds[1] - len(kept)))
        if not sampled:
            raise InputError(f"{name.text}: {rows} rows are too few, expected at least {bounds[1]} to sample from")
        pairs = _read_rows(tables, sampled)
        filled = [pairs[row] for row in sampled if not is_blank(*pairs[row])]
        dropped += len(sampled) - len(filled)
        kept += filled
    split = drop_blank(kept[bounds[0] : bounds[1]], name.text, details)
    return Pairs(split.source, split.target, dropped, split.origin, split.details)


def _read_rows(tables: Sequence[PairTable], rows: Sequence[int]) -> dict[int, tuple[str, str]]:
    """The pairs at row numbers that count through all tables. Each row group is read once, one at a time."""
    groups = [(table, group) for table in tables for group in range(len(table.group_rows))]
    starts = list(itertools.accumulate((table.group_rows[group] for table, group in groups), initial=0))[:-1]
    found: dict[int, tuple[str, str]] = {}
    for index, members in itertools.groupby(sorted(rows), key=lambda row: bisect.bisect_right(starts, row) - 1):
        numbers = list(members)
        table, group = groups[index]
        found |= zip(numbers, table.pairs(group, [row - starts[index] for row in numbers]))
    return found


def _split_dev(pairs: Pairs, name: SplitName) -> Pairs:
    if name.dev >= len(pairs):
        raise InputError(f"{name.text}: dev={name.dev} of {len(pairs)} pairs, expected fewer than there are")
    rows = list(itertools.islice(random_order(len(pairs), name.seed), name.dev))
    if name.split == "train":
        dev = set(rows)
        rows = [row for row in range(len(pairs)) if row not in dev]
    source, target = [pairs.source[row] for row in rows], [pairs.target[row] for row in rows]
    return Pairs(source, target, pairs.dropped, pairs.origin, pairs.details)


def find_files(
    corpus: Corpus, hub_split: str, folder: str | Path | None = None, revision: str | None = None
) -> tuple[list[Path], str | None]:
    """The files of a split in order, and the hub's commit (None for a local folder). Downloads what is missing."""
    base = folder or os.environ.get(FOLDER_VARIABLE)
    commit = None
    if base:
        root = Path(base) / corpus.repo / corpus.config
    else:
        snapshot = _download(corpus, hub_split, revision)
        commit, root = snapshot.name, snapshot / corpus.config
    pattern = re.compile(rf"(.+-)?{hub_split}(-(?P<number>\d+)-of-(?P<count>\d+))?\.(parquet|arrow)(\.gz)?")
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    matches = [match for match in map(pattern.fullmatch, names) if match]
    if not matches:
        raise InputError(f"{root}: no {hub_split} files, expected {hub_split}-00000-of-00001.parquet or the like")
    shards = [(int(match["number"] or 0), int(match["count"] or 1)) for match in matches]
    if shards != [(number, len(shards)) for number in range(len(shards))]:
        expected = max(count for _, count in shards)
        raise InputError(
            f"{root}: found {len(shards)} {hub_split} files, expected {expected} numbered parts of one table"
        )
    return [root / match.string for match in matches], commit


def _download(corpus: Corpus, hub_split: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = huggingface_hub.snapshot_download(
            corpus.repo, repo_type="dataset", revision=revision, allow_patterns=[f"{corpus.config}/{hub_split}-*"]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0].split(". ")[0].strip() or type(error).__name__
        raise InputError(
            f"{corpus.repo}: cannot be downloaded ({reason}), expected a connection to the hub, or a folder in its"
            f" layout named by {FOLDER_VARIABLE}"
        ) from error
    return Path(path)
