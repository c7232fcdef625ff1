"""The paper's splits by name, from a folder in the hub's layout that the test writes with pyarrow."""

import itertools
import random
from unittest.mock import Mock

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import hub, read_pairs, read_texts
from minillama.errors import InputError

ALT_BLANKS = {"train": {3, 17, 55}, "validation": set(), "test": {0}}
ALT_ROWS = {"train": 120, "validation": 20, "test": 15}
WMT_ROWS = 23_000
WMT_BLANKS = set(random.Random(1).sample(range(WMT_ROWS), 1_500))


def write_table(path, columns, rows_per_group=1_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path, row_group_size=rows_per_group)


def write_alt(folder):
    for split, rows in ALT_ROWS.items():
        translations = [
            {"en": f"{split} {row}", "ja": "" if row in ALT_BLANKS[split] else f"{split}文{row}", "vi": f"v {row}"}
            for row in range(rows)
        ]
        ids = [str(row) for row in range(rows)]
        columns = {"SNT.URLID": ids, "SNT.URLID.SNTID": ids, "url": ids, "translation": translations}
        write_table(folder / f"{split}-00000-of-00001.parquet", columns, 32)


def write_wmt(folder):
    rows = [{"de": "" if row in WMT_BLANKS else f"Satz {row}", "en": f"sentence {row}"} for row in range(WMT_ROWS)]
    bounds = [0, 9_000, 9_500, WMT_ROWS]
    for part, (first, last) in enumerate(itertools.pairwise(bounds)):
        write_table(folder / f"train-{part:05}-of-00003.parquet", {"translation": rows[first:last]})
    write_table(folder / "validation-00000-of-00001.parquet", {"translation": rows[:30]})


@pytest.fixture(scope="module")
def corpora_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_alt(folder / "mutiyama" / "alt" / "alt-parallel")
    write_wmt(folder / "wmt" / "wmt19" / "de-en")
    return folder


@pytest.fixture(autouse=True)
def use_the_folder(corpora_folder, monkeypatch):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(corpora_folder))


def numbers(sentences):
    return [int(sentence.split()[-1]) for sentence in sentences]


@pytest.mark.parametrize(("split", "hub_split"), [("cpt", "validation"), ("train", "train"), ("test", "test")])
def test_alt_splits_are_the_hubs_less_the_blank_pairs(split, hub_split):
    pairs = read_pairs(f"alt:ja-en:{split}", "ja", "en")
    kept = [row for row in range(ALT_ROWS[hub_split]) if row not in ALT_BLANKS[hub_split]]
    assert pairs.source == [f"{hub_split}文{row}" for row in kept]
    assert pairs.target == [f"{hub_split} {row}" for row in kept]
    assert pairs.dropped == len(ALT_BLANKS[hub_split])
    assert pairs.details["rows"] == ALT_ROWS[hub_split]
    assert len(read_pairs(f"alt:vi-en:{split}", "vi", "en")) == ALT_ROWS[hub_split]  # each language has its own blanks


def test_the_direction_changes_nothing_but_the_sides():
    for corpus, code in (("alt", "ja"), ("wmt19", "de")):
        forward = read_pairs(f"{corpus}:{code}-en:train", code, "en")
        backward = read_pairs(f"{corpus}:en-{code}:train", "en", code)
        assert (forward.source, forward.target) == (backward.target, backward.source)


def test_alts_dev_pairs_are_removed_from_train():
    whole = read_pairs("alt:ja-en:train", "ja", "en")
    train = read_pairs("alt:ja-en:train,dev=25", "ja", "en")
    dev = read_pairs("alt:ja-en:dev,dev=25", "ja", "en")
    assert len(dev) == 25
    assert sorted(train.source + dev.source) == sorted(whole.source)
    assert [pair for pair in whole.source if pair in set(train.source)] == train.source
    assert "seed 0, dev 25" in dev.describe()
    assert read_pairs("alt:ja-en:dev,dev=25,seed=4", "ja", "en").source != dev.source


def test_wmt_splits_are_disjoint_ranges_of_one_random_order():
    parts = {split: read_pairs(f"wmt19:de-en:{split}", "de", "en") for split in ("cpt", "train", "dev")}
    assert {split: len(pairs) for split, pairs in parts.items()} == {"cpt": 2_000, "train": 18_000, "dev": 1_000}
    rows = [row for pairs in parts.values() for row in numbers(pairs.target)]
    assert len(set(rows)) == 21_000
    assert not set(rows) & WMT_BLANKS
    for pairs in parts.values():
        assert numbers(pairs.source) == numbers(pairs.target)
    assert parts["dev"].dropped >= parts["train"].dropped >= parts["cpt"].dropped > 0
    # The order is random: early and late rows are everywhere.
    assert 0.4 < sum(numbers(parts["cpt"].target)) / 2_000 / WMT_ROWS < 0.6
    test = read_pairs("wmt19:en-de:test", "en", "de")  # the hub's validation split
    assert numbers(test.source) == [row for row in range(30) if row not in WMT_BLANKS]


def test_the_seed_determines_the_sample():
    first = read_pairs("wmt19:de-en:cpt,seed=7", "de", "en")
    assert first.source == read_pairs("wmt19:de-en:cpt,seed=7", "de", "en").source
    assert first.source != read_pairs("wmt19:de-en:cpt,seed=8", "de", "en").source
    assert "seed 7" in first.describe()


@given(rows=st.integers(1, 300), seed=st.integers(0, 2**40), count=st.integers(0, 300))
def test_a_random_order_has_each_row_once_and_a_fixed_prefix(rows, seed, count):
    whole = list(hub.random_order(rows, seed))
    assert sorted(whole) == list(range(rows))
    assert list(itertools.islice(hub.random_order(rows, seed), count)) == whole[:count]


def test_one_side_of_a_split_is_text():
    texts = read_texts(["alt:ja-en:cpt:ja", "wmt19:de-en:cpt:de,seed=3"])
    assert texts.documents[:20] == [f"validation文{row}" for row in range(20)]
    assert texts.documents[20:] == read_pairs("wmt19:de-en:cpt,seed=3", "de", "en").source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alt:ja-en", "expected a name such as alt:ja-en:train"),
        ("alt:ja-en:valid", "unknown split 'valid', expected one of cpt, train, dev, test"),
        ("alt:en-ja:train", "is en to ja, but ja to en is requested: write alt:ja-en:train"),
        ("wmt19:ja-en:train", "wmt19 has no pair ja-en, expected one such as de-en"),
        ("alt:ja-ja:train", "no pair ja-ja"),
        ("alt:ja-en:dev", "write alt:ja-en:dev,dev=500"),
        ("alt:ja-en:train,dev=ten", "dev is 'ten', expected a whole number"),
        ("alt:ja-en:train,dev=117", "dev=117 of 117 pairs"),
        ("alt:ja-en:train,size=3", "unknown option 'size=3'"),
        ("alt:ja-en:cpt:ja", "expected both: leave out ':ja'"),
        ("alt:ja-en:cpt:de", "'de' is not a side of ja-en"),
        ("alt:ja-xx:test", r"expected columns 'ja' and 'xx'.*found en, ja, vi"),
    ],
)
def test_a_name_that_does_not_fit_says_what_would(name, message):
    with pytest.raises(InputError, match=message) as error:
        read_pairs(name, "ja", "xx" if "xx" in name else "en")
    assert "\n" not in str(error.value)


def test_a_missing_part_of_a_table_and_too_few_rows_are_errors(tmp_path, monkeypatch):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    folder, nine = tmp_path / "wmt" / "wmt19" / "de-en", {"translation": [{"de": "a", "en": "b"}] * 9}
    write_table(folder / "train-00000-of-00001.parquet", nine)
    with pytest.raises(InputError, match="9 rows are too few"):
        read_pairs("wmt19:de-en:train", "de", "en")
    (folder / "train-00000-of-00001.parquet").unlink()
    for part in (0, 2):
        write_table(folder / f"train-{part:05}-of-00003.parquet", nine)
    with pytest.raises(InputError, match="found 2 train files, expected 3 numbered parts"):
        read_pairs("wmt19:de-en:train", "de", "en")
    with pytest.raises(InputError, match="no validation files"):
        read_pairs("wmt19:de-en:test", "de", "en")


def test_the_hubs_commit_is_in_the_report(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "a1b2c3"
    write_alt(snapshot / "alt-parallel")
    download = Mock(return_value=str(snapshot))
    monkeypatch.delenv(hub.FOLDER_VARIABLE)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pairs = read_pairs("alt:ja-en:test,revision=a1b2c3", "ja", "en")
    assert pairs.details["revision"] == "a1b2c3"
    assert download.call_args.args == ("mutiyama/alt",)
    requested = {"repo_type": "dataset", "revision": "a1b2c3", "allow_patterns": ["alt-parallel/test-*"]}
    assert download.call_args.kwargs.items() >= requested.items()


def test_without_a_hub_the_error_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv(hub.FOLDER_VARIABLE)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"mutiyama/alt: cannot be downloaded .*COLLAB_MT_CORPORA") as error:
        read_pairs("alt:ja-en:test", "ja", "en")
    assert "\n" not in str(error.value)
