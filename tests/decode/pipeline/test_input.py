"""Standard input in pieces of any size gives its complete lines, without waiting for the next."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import iter_lines
from decode.pipeline.input import GROUP_BATCHES, LineSource, group_available
from minillama.errors import InputError


def source_of(content: bytes) -> tuple[int, int]:
    read, write = os.pipe()
    os.write(write, content)
    return read, write


@given(st.lists(st.text(alphabet="abcé日 ", max_size=8), max_size=60), st.integers(1, 3), st.booleans())
def test_groups_hold_every_line_once_and_in_order(lines, batch_size, newline_at_end):
    content = "\n".join(lines) + ("\n" if newline_at_end and lines else "")
    read, write = source_of(content.encode())
    os.close(write)
    source = LineSource(read)
    found = list(group_available(iter_lines(source, "lines"), batch_size, source.ready))
    os.close(read)
    expected = content.removesuffix("\n").split("\n") if content else []
    assert [line for group in found for line in group] == expected
    assert all(1 <= len(group) <= GROUP_BATCHES * batch_size for group in found)


def test_items_before_a_refused_one_are_a_group():
    def items():
        yield from "ab"
        raise InputError("the third")

    groups = group_available(items(), 1, lambda: True)
    assert next(groups) == ["a", "b"]
    with pytest.raises(InputError, match="the third"):
        next(groups)


def test_only_whole_lines_are_ready_and_a_closed_pipe_releases_the_last():
    read, write = source_of(b"one\ntwo\nthr")
    source = LineSource(read)
    lines = iter(source)
    assert source.ready()
    assert [next(lines), next(lines)] == [b"one\n", b"two\n"]
    assert not source.ready()
    os.write(write, b"ee")
    assert not source.ready()
    os.close(write)
    assert source.ready()
    assert list(lines) == [b"three"]
    os.close(read)
