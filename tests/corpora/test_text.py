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
    if not closed and lines[-1] == "":
        closed = True
    content = (ending.join(lines) + (ending if closed else "")).encode("utf-8-sig" if mark else "utf-8")
    zipped = zipped or suffix == ".gz"
    path = tmp_path_factory.mktemp("lines") / f"text{suffix}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert read_lines(path) == lines


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "a\rb"])
def test_only_a_line_feed_ends_a_line(tmp_path, mark):
    path = tmp_path / "text"
    path.write_bytes(f"one{mark}still one\ntwo\n".encode())
    assert read_lines(path) == [f"one{mark}still one", "two"]


def test_only_the_first_mark_is_removed(tmp_path):
    path = tmp_path / "text"
    path.write_text("\ufeff\ufeffone\n\ufefftwo\n", encoding="utf-8")
    assert read_lines(path) == ["\ufeffone", "\ufefftwo"]


def test_an_empty_file_has_no_lines(tmp_path):
    for name, content in [("a", b""), ("b.gz", gzip.compress(b"")), ("c.gz", b"")]:
        (tmp_path / name).write_bytes(content)
        assert read_lines(tmp_path / name) == []


@given(before=st.lists(LINE, max_size=5), bad=st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe3\x81"]))
def test_bytes_that_are_not_utf8_are_named_by_line(before, bad):
    content = b"".join(line.encode() + b"\n" for line in before) + b"ab" + bad + b"\nlater\n"
    with pytest.raises(InputError, match=rf"^text:{len(before) + 1}: not valid UTF-8 .*column 3") as error:
        list(iter_lines(io.BytesIO(content), "text"))
    assert "\n" not in str(error.value)


def test_utf16_is_recognised(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("über\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"text:1: .*UTF-16"):
        read_lines(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone: no such file"):
        read_lines(tmp_path / "gone")
    with pytest.raises(InputError, match="is a folder"):
        read_lines(tmp_path)
    (tmp_path / "false.gz").write_bytes(b"plain text\n")
    with pytest.raises(InputError, match=r"false\.gz: not gzip data"):
        read_lines(tmp_path / "false.gz")


@pytest.mark.parametrize("cut", [11, 40, -1])
def test_a_truncated_gzip_file_is_an_error(tmp_path, cut):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress("\n".join(str(number**3) for number in range(500)).encode())[:cut])
    with pytest.raises(InputError, match=r"cut\.gz:\d+: the gzip data is truncated or damaged"):
        read_lines(path)


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
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"three\n\n"))
    texts = read_texts([tmp_path / "a", tmp_path / "b.gz"])
    assert texts.documents == ["one", "two", "three"]
    assert texts.dropped == 3
    assert "3 documents" in texts.describe()
    assert "3 empty lines dropped" in texts.describe()
