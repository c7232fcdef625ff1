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

Files come from the hub (or its local cache), or from a folder in the hub's layout, `FOLDER/mutiyama/alt/alt-parallel/`,
that the environment variable COLLAB_MT_CORPORA names.
"""

import bisect
import itertools
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from corpora.pairs import Pairs, drop_blank, is_blank
from corpora.tables import RowGroup, open_table
from corpora.text import Texts
from minillama.errors import InputError

FOLDER_VARIABLE = "COLLAB_MT_CORPORA"
SPLITS = ("cpt", "train", "dev", "test")
_NAME = re.compile(r"(?P<corpus>[^:,]+):(?P<source>[^:,-]+)-(?P<target>[^:,-]+):(?P<split>[^:,]+)(:(?P<side>[^:,]+))?")


@dataclass(frozen=True)
class Corpus:
    """A dataset on the hub and the hub's split for each of SPLITS.

    languages: the one pair that is used, empty for all of the table's.   sampled: positions of a split in the random
    order, the end not included; empty where splits are whole tables.
    """

    repo: str
    config: str
    hub_splits: tuple[str, str, str, str]
    languages: tuple[str, ...] = ()
    sampled: Mapping[str, tuple[int, int]] = field(default_factory=dict)


CORPORA = {
    "alt": Corpus("mutiyama/alt", "alt-parallel", ("validation", "train", "train", "test")),
    "wmt19": Corpus(
        "wmt/wmt19",
        "de-en",
        ("train", "train", "train", "validation"),
        languages=("de", "en"),
        sampled={"cpt": (0, 2_000), "train": (2_000, 20_000), "dev": (20_000, 21_000)},
    ),
}


@dataclass(frozen=True)
class SplitName:
    """A parsed name of a split."""

    text: str
    corpus: Corpus
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


def parse_name(text: str) -> SplitName:
    """Parse the name of a split; raises InputError that says what would be right."""
    head, *assignments = text.split(",")
    match = _NAME.fullmatch(head)
    if not match:
        raise InputError(f"{text}: expected a name such as alt:ja-en:train or wmt19:de-en:test")
    name, source, target, split, side = match.group("corpus", "source", "target", "split", "side")
    corpus = CORPORA[name]
    if split not in SPLITS:
        raise InputError(f"{text}: unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if source == target or (corpus.languages and {source, target} != set(corpus.languages)):
        example = "-".join(corpus.languages) or "ja-en"
        raise InputError(f"{text}: {name} has no pair {source}-{target}, expected one such as {example}")
    if side not in (None, source, target):
        raise InputError(f"{text}: {side!r} is not a side of {source}-{target}, expected {source} or {target}")
    options = {"seed": "0", "dev": "0", "revision": ""}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in options or not value:
            raise InputError(f"{text}: unknown option {assignment!r}, expected one of seed=N, dev=N, revision=COMMIT")
        if key == "dev" and corpus.sampled:
            raise InputError(f"{text}: the option dev is for alt, {name} has a dev split of its own")
        if key != "revision" and not re.fullmatch(r"[0-9]+", value):
            raise InputError(f"{text}: {key} is {value!r}, expected a whole number")
        options[key] = value
    seed, dev = int(options["seed"]), int(options["dev"])
    if split == "dev" and not corpus.sampled and not dev:
        raise InputError(
            f"{text}: the paper leaves alt no dev split; write {text},dev=500 and train on its train,dev=500"
        )
    return SplitName(text, corpus, source, target, split, side, seed, dev, options["revision"] or None)


def load_pairs(text: str, source: str, target: str) -> Pairs:
    """The pairs of a named split, whose direction must be source -> target; see corpora.read.read_pairs."""
    name = parse_name(text)
    if (name.source, name.target) != (source, target):
        right = text.replace(f":{name.source}-{name.target}:", f":{source}-{target}:", 1)
        raise InputError(
            f"{text}: is {name.source} to {name.target}, but {source} to {target} is requested: write {right}"
        )
    if name.side:
        raise InputError(f"{text}: is one side of the pairs, expected both: leave out ':{name.side}'")
    return _load(name)


def load_texts(text: str) -> Texts:
    """One side of a named split, for continued pre-training."""
    name = parse_name(text)
    if not name.side:
        raise InputError(
            f"{text}: has two sides, expected one: write {text.split(',')[0]}:{name.source} or :{name.target}"
        )
    pairs = _load(name)
    documents = pairs.source if name.side == name.source else pairs.target
    return Texts(documents, pairs.dropped, text, pairs.details)


def _load(name: SplitName) -> Pairs:
    files, revision = _find_files(name)
    groups = [group for file in files for group in open_table(file, name.source, name.target)]
    details: dict[str, object] = {"rows": sum(group.rows for group in groups)}
    if revision:
        details["revision"] = revision
    if name.split in name.corpus.sampled:
        return _sample_rows(groups, name, {**details, "seed": name.seed})
    records = itertools.chain.from_iterable(group.pairs() for group in groups)
    pairs = drop_blank(records, name.text, details)
    return _split_dev(pairs, name) if name.dev and name.split in ("train", "dev") else pairs


def random_order(rows: int, seed: int) -> Iterator[int]:
    """Yield the row numbers 0..rows-1 in random order, each once."""
    generator = random.Random(seed)
    seen: set[int] = set()
    while len(seen) < rows:
        row = generator.randrange(rows)
        if row not in seen:
            seen.add(row)
            yield row


def _sample_rows(groups: Sequence[RowGroup], name: SplitName, details: Mapping[str, object]) -> Pairs:
    """The split's positions of the random order, in which blank pairs are skipped."""
    first, last = name.corpus.sampled[name.split]
    rows = sum(group.rows for group in groups)
    order = random_order(rows, name.seed)
    kept: list[tuple[str, str]] = []
    dropped = 0
    while len(kept) < last:
        sampled = list(itertools.islice(order, last - len(kept)))
        if not sampled:
            raise InputError(f"{name.text}: {rows} rows are too few, expected at least {last} to sample from")
        pairs = _read_rows(groups, sampled)
        filled = [pairs[row] for row in sampled if not is_blank(*pairs[row])]
        dropped += len(sampled) - len(filled)
        kept += filled
    return replace(drop_blank(kept[first:last], name.text, details), dropped=dropped)


def _read_rows(groups: Sequence[RowGroup], rows: Sequence[int]) -> dict[int, tuple[str, str]]:
    """The pairs at row numbers that count through all groups. Each group is read once, one at a time."""
    starts = list(itertools.accumulate((group.rows for group in groups), initial=0))[:-1]
    found: dict[int, tuple[str, str]] = {}
    for index, members in itertools.groupby(sorted(rows), key=lambda row: bisect.bisect_right(starts, row) - 1):
        numbers = list(members)
        found |= zip(numbers, groups[index].pairs([row - starts[index] for row in numbers]))
    return found


def _split_dev(pairs: Pairs, name: SplitName) -> Pairs:
    if name.dev >= len(pairs):
        raise InputError(f"{name.text}: dev={name.dev} of {len(pairs)} pairs, expected fewer than there are")
    rows = list(itertools.islice(random_order(len(pairs), name.seed), name.dev))
    if name.split == "train":
        rows = sorted(set(range(len(pairs))).difference(rows))
    source, target = [pairs.source[row] for row in rows], [pairs.target[row] for row in rows]
    details = {**pairs.details, "seed": name.seed, "dev": name.dev}
    return Pairs(source, target, pairs.dropped, pairs.origin, details)


def _find_files(name: SplitName) -> tuple[list[Path], str | None]:
    """The files of a split in order, and the hub's commit (None for a local folder). Downloads what is missing."""
    corpus, hub_split = name.corpus, name.corpus.hub_splits[SPLITS.index(name.split)]
    commit = None
    if base := os.environ.get(FOLDER_VARIABLE):
        root = Path(base) / corpus.repo / corpus.config
    else:
        snapshot = _download(corpus, hub_split, name.revision)
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
