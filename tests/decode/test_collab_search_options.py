"""Sampling and beam search on the command line: same lines, same results, and options that exclude one another."""

import json

import pytest

from corpora import sample
from decode.collab import main
from decode.pipeline.journal import Record
from decode.pipeline.output import NBestWriter
from minillama.errors import exit_code

PAIRS = sample()


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "src.txt").write_text("\n".join([PAIRS.source[0], "", *PAIRS.source[1:4]]) + "\n", encoding="utf-8")
    return tmp_path


def arguments(folders, texts, *extra):
    models = [part for name in "AC" for part in ("--model", f"{name}={folders[name]}")]
    languages = ["--source", "ja", "--target", "en", "--input", str(texts / "src.txt"), "--max-new-tokens", "10"]
    return [*models, *languages, "--output", str(texts / "hyp.txt"), *extra]


def output_of(folders, texts, *extra):
    assert main(arguments(folders, texts, *extra)) == 0
    return (texts / "hyp.txt").read_text(encoding="utf-8")


def test_a_lines_sample_does_not_depend_on_its_batch(model_folders, texts):
    sampled = ("--sample", "--temperature", "0.8", "--top-k", "50", "--top-p", "0.95", "--seed", "7")
    first = output_of(model_folders, texts, *sampled)
    assert output_of(model_folders, texts, *sampled, "--batch-size", "2") == first
    assert output_of(model_folders, texts, *sampled[:-1], "8") != first
    assert output_of(model_folders, texts, "--sample", "--top-k", "1") == output_of(model_folders, texts)
    # A line's sample does not depend on the lines before it, only on its number.
    lines = (texts / "src.txt").read_text(encoding="utf-8").split("\n")
    (texts / "src.txt").write_text("\n".join(["", "", *lines[2:]]), encoding="utf-8")
    assert output_of(model_folders, texts, *sampled).split("\n")[2:] == first.split("\n")[2:]


def test_the_best_and_the_lists_are_written(model_folders, texts):
    report = texts / "run.json"
    options = ("--beam", "4", "--nbest", "3", "--length-penalty", "0.8", "--report", str(report))
    assert main(arguments(model_folders, texts, *options)) == 0
    hypotheses = (texts / "hyp.txt").read_text(encoding="utf-8").split("\n")[:-1]
    entries = [line.split(" ||| ") for line in (texts / "hyp.txt.nbest").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [int(entry[0]) for entry in entries] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert entries[3][1:] == ["", "F0= 0", "0"]
    for line, text in enumerate(hypotheses):
        of_line = [entry for entry in entries if int(entry[0]) == line]
        assert of_line[0][1] == text
        scores = [float(entry[3]) for entry in of_line]
        assert scores == sorted(scores, reverse=True)
        assert all(float(entry[2].removeprefix("F0= ")) <= 0 for entry in of_line)
    found = json.loads(report.read_text())
    assert (found["beam"], found["length_penalty"], found["nbest"]) == (4, 0.8, 3)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--temperature", "0.5"), "without --sample"),
        (("--seed", "1"), "without --sample"),
        (("--sample", "--temperature", "0"), "--temperature 0"),
        (("--sample", "--temperature", "nan"), "--temperature nan"),
        (("--sample", "--top-p", "1.5"), "--top-p 1.5"),
        (("--sample", "--top-k", "-1"), "--top-k -1"),
        (("--sample", "--seed", "-1"), "--seed -1"),
        (("--beam", "0"), "--beam 0"),
        (("--beam", "9"), "--beam 9"),
        (("--beam", "2", "--nbest", "3"), "--nbest 3"),
        (("--beam", "2", "--sample"), "exclude one another"),
        (("--length-penalty", "0.5"), "without --beam"),
        (("--beam", "2", "--nbest-output", "x"), "without --nbest"),
        (("--beam", "2", "--nbest", "2", "--output", "-"), "--nbest-output"),
        (("--beam", "2", "--nbest", "2", "--nbest-output", "-"), "give a file"),
        (("--beam", "2", "--nbest", "2", "--nbest-output", "/no/such/folder/x"), "/no/such/folder/x: cannot be"),
    ],
)
def test_bad_options_are_refused_in_one_line(model_folders, texts, capsys, extra, named):
    code = exit_code(lambda: main(arguments(model_folders, texts, *extra)))
    error = capsys.readouterr().err
    assert code == 2
    assert named in error
    assert error.count("\n") == 1


def test_lists_that_wait_for_an_unfinished_line_are_kept_after_an_interruption(tmp_path):
    found = [["text [5]", -0.75, -0.375]]
    with NBestWriter(str(tmp_path / "nbest")) as writer:
        for line in (0, 3, 2):
            writer.put_sentence(line, "", Record(line, "text [5]", [5], [-0.5], "stop", found))
        writer.write_finished()
    lines = (tmp_path / "nbest").read_text().splitlines()
    assert [line.split(" ||| ")[0] for line in lines] == ["0", "2", "3"]
    assert lines[0] == "0 ||| text [5] ||| F0= -0.750000 ||| -0.375000"
