"""Standard input in pieces of any size gives its complete lines, without waiting for the next."""

import os

from hypothesis import given
from hypothesis import strategies as st

from decode.pipeline.input import LineSource, read_available_lines


def source_of(content: bytes) -> tuple[int, int]:
    read, write = os.pipe()
    os.write(write, content)
    return read, write


@given(st.lists(st.text(alphabet="abcé日 ", max_size=8), max_size=30), st.integers(1, 9), st.booleans())
def test_groups_hold_every_line_once_and_in_order(lines, most, newline_at_end):
    content = "\n".join(lines) + ("\n" if newline_at_end and lines else "")
    read, write = source_of(content.encode())
    os.close(write)
    found = list(read_available_lines(read, most))
    os.close(read)
    expected = content.removesuffix("\n").split("\n") if content else []
    assert [line for group in found for line in group] == expected
    assert all(1 <= len(group) <= most for group in found)


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
