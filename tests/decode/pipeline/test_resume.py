"""A run that was killed or interrupted resumes to the bytes of an uninterrupted one. The long form is test_kills.py."""

import fcntl
import json
import os
import random
import signal

import pytest
from processes import LINES, arguments, code_of, kill, outcome, start, uninterrupted, wait_for_lines

from decode.collab import main
from decode.pipeline.journal import read_records
from minillama.errors import exit_code


def test_resume_without_a_journal_starts_a_run_and_leaves_none(model_folders, source):
    expected = uninterrupted(model_folders, source)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected
    assert {file.name for file in source.iterdir()} == {"src.txt", "hyp.txt", "run.json"}


def test_a_run_killed_twice_ends_with_the_bytes_of_an_uninterrupted_one(model_folders, source):
    expected = uninterrupted(model_folders, source)
    journal = source / "hyp.txt.journal"
    for lines in sorted(random.Random().sample(range(1, 50), 2)):
        process = start(arguments(model_folders, source, "--resume"))
        wait_for_lines([journal], lines)
        kill(process)
    finished = len({record.line for record in read_records(journal)})
    assert main(arguments(model_folders, source, "--resume", "--batch-size", "3")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] == finished
    assert not journal.exists()


def test_a_run_whose_sentences_are_all_finished_loads_no_weights(model_folders, source, monkeypatch):
    expected = uninterrupted(model_folders, source)
    monkeypatch.setattr("decode.pipeline.journal.remove_journal", lambda path: None)  # as if killed after the report
    assert main(arguments(model_folders, source)) == 0
    monkeypatch.undo()
    (source / "hyp.txt").write_text("half a li")
    monkeypatch.setattr("decode.pipeline.members.EnsembleSpec.load", None)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


def test_a_journal_is_neither_overwritten_nor_mixed_with_another_run(model_folders, source, capsys):
    journal = source / "hyp.txt.journal"
    process = start(arguments(model_folders, source))
    wait_for_lines([journal], 5)
    kill(process)
    before = journal.read_bytes()
    for extra, named in [
        ((), "--resume continues it"),
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
    (source / "src.txt").write_text("\n".join([*LINES, "もう一つ"]) + "\n", encoding="utf-8")
    assert exit_code(lambda: main(arguments(model_folders, source, "--resume"))) == 2
    assert f"input was {len(LINES)} lines" in capsys.readouterr().err
    (source / "src.txt").write_text("\n".join(LINES[:8]) + "\n", encoding="utf-8")
    assert main(arguments(model_folders, source, "--no-resume")) == 0
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] == 0


def test_an_interrupted_run_says_that_it_can_be_resumed(model_folders, source):
    expected = uninterrupted(model_folders, source)
    process = start(arguments(model_folders, source), source / "log")
    journal = source / "hyp.txt.journal"
    wait_for_lines([journal], 3)
    os.kill(process.pid, signal.SIGTERM)
    assert code_of(process) == 130
    assert "--resume continues from there" in (source / "log").read_text()
    with open(journal, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


@pytest.mark.parametrize("extra", [("--output", "-"), ("--input", "-"), ("--output", "/dev/null")])
def test_resume_needs_files_at_both_ends(model_folders, source, capsys, extra):
    assert exit_code(lambda: main(arguments(model_folders, source, "--resume", *extra))) == 2
    assert "--resume: needs --input FILE and --output FILE" in capsys.readouterr().err


def test_details_are_the_records_in_the_order_of_the_input(model_folders, source):
    extra = ("--details", str(source / "details.jsonl"))
    assert main(arguments(model_folders, source, *extra)) == 0
    found = [json.loads(line) for line in (source / "details.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [entry["line"] for entry in found] == list(range(1, len(LINES) + 1))
    assert [entry["text"] for entry in found] == (source / "hyp.txt").read_text(encoding="utf-8").split("\n")[:-1]
    report = json.loads((source / "run.json").read_text())
    assert sum(len(entry["tokens"]) for entry in found) == report["output_tokens"]
    assert all(len(entry["tokens"]) == len(entry["logprobs"]) for entry in found)
    assert report["first_token_seconds"] > 0
