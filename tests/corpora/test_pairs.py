"""Pairs are the same from every format; what does not fit is named by file and line. Files are written by pyarrow,
json and gzip."""

import gzip
import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import read_pairs, sample
from minillama.errors import InputError

SIDE = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t\ufeff"), max_size=15)
PAIRS = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=6)
KNOWN = [
    ("犬がいる。", "there is a dog."),
    ("", "nothing"),
    ("猫", "a \u2028 cat"),
    ("何も", " "),
    ("「はい」", '"yes"'),
]


def lines_writer(line, suffix):
    def write(folder, pairs):
        path = folder / f"pairs.{suffix}"
        path.write_bytes("".join(f"{line(ja, en)}\n" for ja, en in pairs).encode())
        return [path]

    return write


def write_aligned(folder, pairs):
    for side, name in enumerate(["text.ja", "text.en"]):
        (folder / name).write_bytes("".join(pair[side] + "\n" for pair in pairs).encode())
    return [folder / "text.ja", folder / "text.en"]


def table_of(pairs, kind):
    ja, en = ([pair[side] for pair in pairs] for side in (0, 1))
    if kind == "nested":
        rows = [{"ja": a, "en": b, "vi": "x"} for a, b in zip(ja, en)]
        return pa.table({"SNT.URLID": [str(n) for n in range(len(rows))], "url": ja, "translation": rows})
    if kind == "flat":
        return pa.table({"en": pa.array(en, pa.large_string()), "ja": pa.array(ja).dictionary_encode(), "id": en})
    return pa.table({"source": ja, "target": en})


def table_writer(kind, suffix):
    def write(folder, pairs):
        path, table = folder / f"pairs.{suffix}", table_of(pairs, kind)
        if suffix == "parquet":
            pa.parquet.write_table(table, path, row_group_size=2)
        elif suffix == "feather":
            pa.feather.write_feather(table, path, chunksize=2)
        else:
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        return [path]

    return write


WRITERS = {
    "tsv": lines_writer("{}\t{}".format, "tsv"),
    "aligned": write_aligned,
    "json-codes": lines_writer(lambda ja, en: json.dumps({"en": en, "ja": ja, "id": 3}), "jsonl"),
    "json-translation": lines_writer(lambda ja, en: json.dumps({"translation": {"ja": ja, "en": en}}), "jsonl"),
    "json-source-target": lines_writer(lambda ja, en: json.dumps({"source": ja, "target": en}), "jsonl"),
    **{
        f"{suffix}-{kind}": table_writer(kind, suffix)
        for suffix in ("parquet", "feather", "arrow")
        for kind in ("nested", "flat", "plain")
    },
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_every_format_gives_the_same_pairs(tmp_path, writer, zipped):
    files = writer(tmp_path, KNOWN)
    if zipped:
        for index, path in enumerate(files):
            files[index] = path.with_name(path.name + ".gz")
            files[index].write_bytes(gzip.compress(path.read_bytes()))
    pairs = read_pairs(files, "ja", "en")
    kept = [pair for pair in KNOWN if pair[0].strip() and pair[1].strip()]
    assert list(zip(pairs.source, pairs.target)) == kept
    assert pairs.dropped == len(KNOWN) - len(kept)
    assert f"{len(kept)} pairs, 2 dropped" in pairs.describe()


@given(pairs=PAIRS)
def test_no_pair_is_lost_and_none_is_blank(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    for kind in ("tsv", "aligned", "json-codes", "parquet-nested"):
        if kind == "tsv" and set(pairs[0]) in ({"ja", "en"}, {"source", "target"}):
            continue
        read = read_pairs(WRITERS[kind](folder, pairs), "ja", "en")
        assert len(read) + read.dropped == len(pairs)
        assert list(zip(read.source, read.target)) == [pair for pair in pairs if pair[0].strip() and pair[1].strip()]


@pytest.mark.parametrize("kind", ["json-codes", "parquet-nested", "arrow-flat", "tsv"])
def test_records_and_a_header_of_codes_give_the_direction(tmp_path, kind):
    pairs = read_pairs(WRITERS[kind](tmp_path, [*([("ja", "en")] if kind == "tsv" else []), ("犬", "dog")]), "en", "ja")
    assert (pairs.source, pairs.target) == (["dog"], ["犬"])


def test_a_sentence_is_one_line(tmp_path):
    pairs = read_pairs(WRITERS["json-codes"](tmp_path, [("一\n二\r\n", "one \n two")]), "ja", "en")
    assert (pairs.source, pairs.target) == (["一 二"], ["one two"])


def test_null_counts_as_an_empty_side(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ja": null, "en": "x"}\n\n{"ja": "い", "en": "i"}\n', encoding="utf-8")
    rows = [{"ja": None, "en": "x"}, None, {"ja": "い", "en": "i"}]
    pa.parquet.write_table(pa.table({"translation": rows}), tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.jsonl", "ja", "en").dropped == 1
    pairs = read_pairs(tmp_path / "a.parquet", "ja", "en")
    assert (pairs.dropped, pairs.source) == (2, ["い"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.tsv", "a\tb\nc\td\te\n", r"pairs\.tsv:2: expected 2 columns, found 3$"),
        ("pairs.tsv", "a\tb\n\nc\n", r"pairs\.tsv:3: expected 2 columns, found 1$"),
        ("pairs.jsonl", '{"ja": "a", "en": "b"}\n{"ja": "a"\n', r"pairs\.jsonl:2: not JSON"),
        ("pairs.jsonl", "[1]\n", r"pairs\.jsonl:1: expected a JSON object, found list"),
        ("pairs.jsonl", '{"de": "a", "en": "b"}\n', r'pairs\.jsonl:1: expected keys "ja" and "en".*found "de", "en"'),
        ("pairs.jsonl", '{"ja": 3, "en": "b"}\n', r'pairs\.jsonl:1: "ja" is int, expected a string'),
        ("pairs.jsonl", '{"ja": "\\ud800", "en": "b"}\n', r"pairs\.jsonl:1: .*surrogate"),
        ("pairs.txt", "a\tb\n", r"pairs\.txt: unknown format of pairs, expected a name ending in one of \.tsv"),
        ("pairs.parquet", "not a table", r"pairs\.parquet: cannot be read .*expected a whole parquet or arrow file"),
        ("pairs.parquet", "", r"pairs\.parquet: cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_pairs(tmp_path / name, "ja", "en")
    assert "\n" not in str(error.value)


def test_files_that_are_no_pair_are_an_error(tmp_path):
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    for files, message in (
        ([tmp_path / "a", tmp_path / "b"], r"a has 3 lines and .*b has 2, expected the same number"),
        ([], "found 0 files"),
        (["a", "b", "c"], "found 3 files"),
        (["a.txt", "b.tsv"], r"b\.tsv: already holds pairs"),
        (["-", "-"], "both source and target"),
    ):
        with pytest.raises(InputError, match=message):
            read_pairs(files, "ja", "en")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_tables_that_do_not_fit_are_named(tmp_path, kind):
    whole = table_writer("nested", kind)(tmp_path, KNOWN * 50)[0]
    with pytest.raises(InputError, match=r"expected columns 'de' and 'en'.*found ja, en, vi"):
        read_pairs(whole, "de", "en")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(whole, "ja", "en")
    pa.parquet.write_table(pa.table({"ja": [1], "en": ["x"]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="column 'ja' is int64, expected text"):
        read_pairs(tmp_path / "numbers.parquet", "ja", "en")
    broken = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"ja": broken, "en": ["a", "b"]}), tmp_path / "broken.parquet")
    with pytest.raises(InputError, match=r"broken\.parquet: row group 0, row 1: not valid UTF-8"):
        read_pairs(tmp_path / "broken.parquet", "ja", "en")


def test_the_sample_is_aligned_in_both_directions():
    pairs = sample()
    assert (len(pairs), pairs.dropped) == (40, 0)
    assert dict(zip(pairs.source, pairs.target))["食事の前に手を洗いなさい。"] == "wash your hands before meals."
    assert (sample("en", "ja").source, sample("en", "ja").target) == (pairs.target, pairs.source)
    with pytest.raises(InputError, match="not de and en"):
        sample("de", "en")
