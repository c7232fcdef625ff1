"""What a line of a file is, and what a broken file says. Files are written with Python's own gzip and codecs."""

import gzip
import io
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import read_texts
from corpora.text import iter_lines, read_lines
from minillama.errors import InputError

# Any text without the line feed; a trailing carriage return would belong to the line end.
LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\ufeff"), max_size=20)


@given(
    lines=st.lists(LINE, min_size=1, max_size=8),
    ending=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    mark=st.booleans(),
    zipped=st.booleans(),
    suffix=st.sampled_from([".txt", ".gz"]),
)
def test_lines_come_back_whatever_the_packing(tmp_path_factory, lines, ending, closed, mark, zipped, suffix):
    end = ending if closed or lines[-1] == "" else ""
    content = (ending.join(lines) + end).encode("utf-8-sig" if mark else "utf-8")
    zipped = zipped or suffix == ".gz"
    path = tmp_path_factory.mktemp("lines") / f"text{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    assert read_lines(path) == lines


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "a\rb"])
def test_only_a_line_feed_ends_a_line_and_only_the_first_byte_order_mark_is_removed(tmp_path, mark):
    path = tmp_path / "text"
    path.write_bytes(f"\ufeff\ufeffone{mark}still one\n\ufefftwo\n".encode())
    assert read_lines(path) == [f"\ufeffone{mark}still one", "\ufefftwo"]


@given(before=st.lists(LINE, max_size=5), bad=st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe3\x81"]))
def test_bytes_that_are_not_utf8_are_named_by_line(before, bad):
    content = b"".join(line.encode() + b"\n" for line in before) + b"ab" + bad + b"\nlater\n"
    with pytest.raises(InputError, match=rf"^text:{len(before) + 1}: not valid UTF-8 .*column 3") as error:
        list(iter_lines(io.BytesIO(content), "text"))
    assert "\n" not in str(error.value)


CUBES = gzip.compress("\n".join(str(number**3) for number in range(500)).encode(), mtime=0)  # in the names of tests


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", "über\n".encode("utf-16"), "text:1: .*UTF-16"),
        ("false.gz", b"plain text\n", r"false\.gz: not gzip data"),
        *(("cut.gz", CUBES[:at], r"cut\.gz:\d+: the gzip data is truncated or damaged") for at in (11, 40, -1)),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path, named in ((name, message), ("gone", "gone: no such file"), ("", "is a folder")):
        with pytest.raises(InputError, match=named):
            read_lines(tmp_path / path)


def test_a_line_is_there_before_the_stream_ends():
    reader, writer = os.pipe()
    with open(reader, "rb") as stream:
        lines = iter_lines(stream, "pipe")
        os.write(writer, b"first\nsec")
        assert next(lines) == "first"
        os.write(writer, b"ond\n")
        assert next(lines) == "second"
        os.close(writer)
        assert list(lines) == []


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_reads_as_a_file(monkeypatch, pack):
    stream = io.BufferedReader(io.BytesIO(pack(b"eins\r\nzwei")))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    assert read_lines("-") == ["eins", "zwei"]


def test_blank_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a").write_text("one\n\n \t\u3000\ntwo\n", encoding="utf-8")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"three\n\n", mtime=0))
    (tmp_path / "c").write_bytes(b"")
    (tmp_path / "d.gz").write_bytes(b"")
    texts = read_texts([tmp_path / name for name in ("a", "b.gz", "c", "d.gz")])
    assert (texts.documents, texts.dropped) == (["one", "two", "three"], 3)
    assert "3 documents" in texts.describe()
