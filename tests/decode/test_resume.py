"""Nothing that was finished is lost: journals, resumed runs, killed runs. The long version is test_kills.py."""

import fcntl
import json
import os
import random
import signal
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import code_of, start

from corpora import sample
from decode.collab import main
from decode.pipeline.journal import Record, Tail, begin, journal_path, part_path, records
from minillama import InputError
from minillama.errors import exit_code

RUN = {"input": "3 lines", "max_new_tokens": 12}
SENTENCES = [f"{first}{second}" for first in sample().source[:12] for second in sample().source[20:30]]
LINES = [*SENTENCES[:60], "", " ", *SENTENCES[60:]]


@pytest.fixture
def source(tmp_path):
    """120 sentences, some lines blank."""
    (tmp_path / "src.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tmp_path


def arguments(folders, folder, *extra, new=10):
    """Eight rows, so that a run of 120 sentences takes long enough to be killed in the middle."""
    models = ["--model", f"A={folders['A']}", "--model", f"C={folders['C']}"]
    texts = ["--source", "ja", "--target", "en", "--input", str(folder / "src.txt")]
    files = ["--output", str(folder / "hyp.txt"), "--report", str(folder / "run.json")]
    limits = ["--batch-size", "8", "--max-new-tokens", str(new), "--too-long", "skip"]
    return [*models, *texts, *files, *limits, *extra]


def outcome(folder):
    """The bytes of the output, and the counts that do not depend on how the run went."""
    report = json.loads((folder / "run.json").read_text())
    return (folder / "hyp.txt").read_bytes(), report["sentences"], report["output_tokens"], report["skipped_lines"]


def unbroken(folders, folder):
    assert main(arguments(folders, folder)) == 0
    found = outcome(folder)
    for file in ("hyp.txt", "run.json"):
        (folder / file).unlink()
    return found


def kill_when(process, journal, lines):
    """SIGKILL as soon as the journal has so many lines."""
    while process.is_alive() and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert code_of(process) == -signal.SIGKILL


def journal_of(path, count, run=RUN):
    part, _ = begin(path, run, None)
    written = [Record(line, f"文 {line}\u2028", [line, 7], [-0.1 * line, -1e-7], "stop") for line in range(count)]
    with part:
        for record in written:
            part.write(record)
    return written


def test_a_record_comes_back_with_the_same_bits(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    assert list(records(path)) == []
    assert journal_of(path, 5) == list(records(path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([b"", b"\0" * 40, b'{"line": 3', b"no JSON\n"]))
def test_whatever_is_torn_off_the_whole_records_before_it_count(tmp_path, cut, tail):
    path = tmp_path / "hyp.txt.journal"
    path.unlink(missing_ok=True)
    written = journal_of(path, 4)
    content = path.read_bytes()
    kept = content[: cut % (len(content) + 1)]
    path.write_bytes(kept + tail)
    whole = max(0, kept.count(b"\n") - 1)
    part, done = begin(path, RUN, True)
    with part:
        assert done == set(range(whole))
        for record in written[whole:]:
            part.write(record)
        assert list(records(path)) == written


def test_the_parts_of_other_ranks_are_brought_in_and_a_record_may_be_there_twice(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    written = journal_of(path, 2)
    part_path(path, 3).write_bytes(path.read_bytes())
    with begin(part_path(path, 1), RUN, None)[0] as other:
        other.write(Record(9, "nine", [1], [-1.0], "length"))
        other.end({"steps": 3})
    tail = Tail(part_path(path, 1))
    assert [record.line for record in tail.new()] == [9]
    assert list(tail.new()) == []
    assert tail.summary == {"steps": 3}
    part, done = begin(path, RUN, True)
    part.close()
    assert done == {0, 1, 9}
    assert list(records(path)) == [*written, Record(9, "nine", [1], [-1.0], "length"), *written]
    assert not part_path(path, 1).exists()
    assert not part_path(path, 3).exists()


def test_the_journal_of_another_run_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    written = journal_of(path, 2)
    with pytest.raises(InputError, match=r"max_new_tokens was 12, is 13, beam was not there, is 4; --no-resume"):
        begin(path, {**RUN, "max_new_tokens": 13, "beam": 4}, True)
    with pytest.raises(InputError, match="2 finished sentences of a run that did not end; --resume"):
        begin(path, RUN, None)
    assert list(records(path)) == written
    part, done = begin(path, {"input": "others"}, False)
    part.close()
    assert not done
    assert not path.exists()


def test_two_runs_never_write_one_output(tmp_path):
    path = tmp_path / "hyp.txt.journal"
    part, _ = begin(path, RUN, None)
    with part, pytest.raises(InputError, match="another run is writing this output now"):
        begin(path, RUN, True)
    assert not path.exists()


def test_only_a_regular_output_has_a_journal(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [journal_path(str(path)) for path in ("-", "/dev/null", tmp_path / "pipe")] == [None] * 3
    assert journal_path(str(tmp_path / "hyp.txt")) == tmp_path / "hyp.txt.journal"


def test_resume_on_a_first_run_simply_starts_and_leaves_no_journal(model_folders, source):
    expected = unbroken(model_folders, source)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected
    assert {file.name for file in source.iterdir()} == {"src.txt", "hyp.txt", "run.json"}


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_unbroken_one(model_folders, source):
    expected = unbroken(model_folders, source)
    journal = source / "hyp.txt.journal"
    draw = random.Random()
    for lines in sorted(draw.sample(range(1, 110), 5)):
        kill_when(start(arguments(model_folders, source, "--resume")), journal, lines)
    finished = len({record.line for record in records(journal)})
    assert main(arguments(model_folders, source, "--resume", "--batch-size", "3")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] == finished
    assert not journal.exists()


def test_a_run_that_was_all_but_whole_needs_no_weights_to_end(model_folders, source, monkeypatch):
    expected = unbroken(model_folders, source)
    monkeypatch.setattr("decode.collab.remove", lambda path: None)  # as if killed between the report and the end
    assert main(arguments(model_folders, source)) == 0
    monkeypatch.undo()
    (source / "hyp.txt").write_text("half a li")
    monkeypatch.setattr("decode.collab.load_ensemble", None)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


def test_a_journal_is_neither_overwritten_nor_mixed_with_another_run(model_folders, source, capsys):
    expected = unbroken(model_folders, source)
    journal = source / "hyp.txt.journal"
    kill_when(start(arguments(model_folders, source)), journal, 5)
    before = journal.read_bytes()
    capsys.readouterr()
    for extra, named in [
        ((), "--resume goes on from there"),
        (("--resume", "--combine", "A - 0.5*C"), "weight of C was 1.0, is -0.5"),
        (("--resume", "--model", f"B={model_folders['B']}"), "model B was not there"),
        (("--resume", "--prompt", "A=paper"), "prompt of A was"),
        (("--resume", "--dtype", "bfloat16"), "dtype of A was float32, is bfloat16"),
    ]:
        assert exit_code(lambda extra=extra: main(arguments(model_folders, source, *extra))) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert journal.read_bytes() == before
    with open(source / "src.txt", "a", encoding="utf-8") as stream:
        stream.write("もう一つ\n")
    assert exit_code(lambda: main(arguments(model_folders, source, "--resume"))) == 2
    assert "input was 122 lines" in capsys.readouterr().err
    (source / "src.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    assert main(arguments(model_folders, source, "--no-resume")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] == 0


def test_an_interrupted_run_says_that_it_can_be_resumed(model_folders, source):
    expected = unbroken(model_folders, source)
    process = start(arguments(model_folders, source), source / "log")
    journal = source / "hyp.txt.journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert code_of(process) == 130
    assert "(--resume goes on from there)" in (source / "log").read_text()
    with open(journal, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


def test_resume_needs_files_at_both_ends(model_folders, source, capsys):
    for extra in (("--output", "-"), ("--input", "-"), ("--output", "/dev/null")):
        assert exit_code(lambda extra=extra: main(arguments(model_folders, source, "--resume", *extra))) == 2
        assert "--resume: needs --input FILE and --output FILE" in capsys.readouterr().err


def test_details_are_the_records_in_the_order_of_the_input(model_folders, source):
    extra = ("--details", str(source / "details.jsonl"))
    assert main(arguments(model_folders, source, *extra)) == 0
    found = [json.loads(line) for line in (source / "details.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [entry["line"] for entry in found] == list(range(1, 123))
    assert [entry["text"] for entry in found] == (source / "hyp.txt").read_text(encoding="utf-8").split("\n")[:-1]
    report = json.loads((source / "run.json").read_text())
    assert sum(len(entry["tokens"]) for entry in found) == report["output_tokens"]
    assert all(len(entry["tokens"]) == len(entry["logprobs"]) for entry in found)
    assert report["first_token_seconds"] > 0
