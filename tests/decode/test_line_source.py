"""Standard input in pieces of any size gives the lines that it has, and never waits for one that has not come."""

import os

from hypothesis import given
from hypothesis import strategies as st

from decode.pipeline.input import LineSource, windows


def source_of(content: bytes) -> tuple[int, int]:
    read, write = os.pipe()
    os.write(write, content)
    return read, write


@given(st.lists(st.text(alphabet="abcé日 ", max_size=8), max_size=30), st.integers(1, 9), st.booleans())
def test_windows_hold_every_line_once_and_in_order(lines, largest, newline_at_end):
    content = "\n".join(lines) + ("\n" if newline_at_end and lines else "")
    read, write = source_of(content.encode())
    os.close(write)
    found = list(windows(read, largest))
    os.close(read)
    expected = content.removesuffix("\n").split("\n") if content else []
    assert [line for window in found for line in window] == expected
    assert all(1 <= len(window) <= largest for window in found)


def test_only_whole_lines_are_ready_and_a_closed_pipe_releases_the_last():
    read, write = source_of(b"one\ntwo\nthr")
    source = LineSource(read)
    assert source.ready()
    assert [next(source), next(source)] == [b"one\n", b"two\n"]
    assert not source.ready()
    os.write(write, b"ee")
    assert not source.ready()
    os.close(write)
    assert source.ready()
    assert next(source) == b"three"
    assert list(source) == []
    os.close(read)
