"""A journal loses nothing that was written, is never mixed with another run, and has one writer."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode.pipeline.journal import (
    Journal,
    JournalReader,
    Record,
    journal_path,
    rank_path,
    read_records,
    remove_journal,
)
from minillama import InputError

RUN = {"input": "3 lines", "max_new_tokens": 12}


def write_journal(path, count, run=RUN):
    records = [Record(line, f"文 {line}\u2028", [line, 7], [-0.1 * line, -1e-7], "stop") for line in range(count)]
    with Journal(path) as journal:
        journal.open_run(run, None)
        for record in records:
            journal.write(record)
    return records


def test_a_record_is_read_back_to_the_bit(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    assert list(read_records(path)) == []
    assert write_journal(path, 5) == list(read_records(path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([b"", b"\0" * 40, b'{"line": 3', b"no JSON\n"]))
def test_complete_records_before_a_damaged_end_count(tmp_path, cut, tail):
    path = tmp_path / "hyp.txt.journal"
    path.unlink(missing_ok=True)
    records = write_journal(path, 4)
    content = path.read_bytes()
    kept = content[: cut % (len(content) + 1)]
    path.write_bytes(kept + tail)
    complete = max(0, kept.count(b"\n") - 1)
    with Journal(path) as journal:
        assert journal.open_run(RUN, True) == set(range(complete))
        for record in records[complete:]:
            journal.write(record)
        assert list(read_records(path)) == records


def test_the_files_of_all_ranks_count_until_the_run_ends(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    records = write_journal(path, 2)
    rank_path(path, 3).write_bytes(path.read_bytes())
    nine = Record(9, "nine", [1], [-1.0], "length")
    with Journal(rank_path(path, 1)) as other:
        other.start(RUN)
        other.write(nine)
    reader = JournalReader(rank_path(path, 1))
    assert list(reader.new_records()) == [nine]
    assert list(reader.new_records()) == []
    with Journal(rank_path(path, 1)) as other:  # a resumed run, which has not ended
        other.start(RUN)
        other.write(records[0])
    assert list(reader.new_records()) == [records[0]]
    with Journal(path) as journal:
        assert journal.open_run(RUN, True) == {0, 1, 9}
    remove_journal(path)
    assert not list(tmp_path.iterdir())


def test_the_journal_of_another_run_is_refused_with_the_differences(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    records = write_journal(path, 2)
    with Journal(path) as journal:
        with pytest.raises(InputError, match=r"max_new_tokens was 12, is 13, beam was not there, is 4; --no-resume"):
            journal.open_run({**RUN, "max_new_tokens": 13, "beam": 4}, True)
        with pytest.raises(InputError, match="2 finished sentences of a run that did not end; --resume"):
            journal.open_run(RUN, None)
    assert list(read_records(path)) == records
    with Journal(path) as journal:
        assert not journal.open_run({"input": "others"}, False)
    assert not path.exists()


def test_two_runs_never_write_one_output(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    with Journal(path), pytest.raises(InputError, match="another run is writing this output now"):
        Journal(path)
    assert not path.exists()


def test_a_run_that_ends_does_not_take_the_journal_of_the_next(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    with Journal(path) as first:
        path.unlink()  # its output is complete
        second = Journal(path)
    with second:
        assert path.exists()
        with pytest.raises(InputError, match="another run"):
            Journal(path)
    assert first.descriptor != second.descriptor


def test_only_a_regular_output_has_a_journal(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [journal_path(str(path)) for path in ("-", "/dev/null", tmp_path / "pipe")] == [None] * 3
    assert journal_path(str(tmp_path / "hyp.txt")) == tmp_path / "hyp.txt.journal"
