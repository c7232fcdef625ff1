"""`decode.collab --explain` as used: pages and text of whole, killed, interrupted, shared and streamed runs."""

import json
import os
import re
import signal

from pages import page_of
from processes import code_of, kill, start, start_ranks, start_with_pipes, wait_for_lines

from corpora import sample
from decode.collab import main
from minillama import Tokenizer
from minillama.errors import exit_code

SENTENCES = [*sample().source[:5], "", *sample().source[5:9]]


def arguments(folders, folder, *extra):
    source = folder / "src.txt"
    if not source.exists():
        source.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    models = ["--model", f"A={folders['A']}", "--model", f"C={folders['C']}", "--combine", "A + 0.5*C"]
    texts = ["--source", "ja", "--target", "en", "--input", str(source), "--output", str(folder / "hyp.txt")]
    return [*models, *texts, "--max-new-tokens", "10", *extra]


def refusal(argv, capsys):
    assert exit_code(lambda: main(argv)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", error)
    return error


def killed(argv, folder):
    """A run, killed when some sentences are in its journal."""
    process = start(argv)
    wait_for_lines([folder / "hyp.txt.journal"], 3)
    kill(process)


def test_the_command_writes_translations_as_before_and_a_page_of_all_lines(model_folders, tmp_path):
    assert main(arguments(model_folders, tmp_path)) == 0
    expected = (tmp_path / "hyp.txt").read_bytes()
    details = tmp_path / "details.jsonl"
    extra = ("--explain", str(tmp_path / "r.html"), "--details", str(details), "--reference", str(tmp_path / "src.txt"))
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    assert (tmp_path / "hyp.txt").read_bytes() == expected
    page = page_of(tmp_path / "r.html")
    assert page.run["members"] == [["A", 1.0], ["C", 0.5]]
    assert page.end["whole"]
    assert [s["line"] for s in page.sentences] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert [s["source"] for s in page.sentences] == [s["reference"] for s in page.sentences]
    assert [s["source"] for s in page.sentences] == [sentence for sentence in SENTENCES if sentence]
    tokenizer = Tokenizer.from_pretrained(model_folders["A"])
    entries = [json.loads(line) for line in details.read_text(encoding="utf-8").splitlines()]
    for sentence in page.sentences:
        entry = entries[sentence["line"] - 1]
        assert sentence["text"] == entry["text"]
        assert [figures[0] for figures in sentence["tokens"]][: len(entry["tokens"])] == entry["tokens"]
        assert [found[0] for found in entry["explanations"]] == [figures[0] for figures in sentence["tokens"]]
        for figures in sentence["tokens"]:
            piece = page.end["pieces"][str(figures[0])]
            assert "\\x" in piece or piece == tokenizer.decode([figures[0]]) or figures[0] in (0, 1)


def test_explained_sentences_survive_a_kill(model_folders, tmp_path):
    page = tmp_path / "r.html"
    extra = ("--explain", str(page), "--batch-size", "2")
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    expected = page.read_bytes()
    page.unlink()
    (tmp_path / "hyp.txt").unlink()
    killed(arguments(model_folders, tmp_path, *extra), tmp_path)
    assert not page.exists()
    assert main(arguments(model_folders, tmp_path, *extra, "--resume")) == 0
    assert page.read_bytes() == expected


def test_a_run_without_explanations_is_not_resumed_by_one_with_them(model_folders, tmp_path, capsys):
    killed(arguments(model_folders, tmp_path, "--batch-size", "2"), tmp_path)
    extra = ("--resume", "--explain", str(tmp_path / "r.html"))
    error = refusal(arguments(model_folders, tmp_path, *extra), capsys)
    assert "explain was False, is True" in error
    assert not (tmp_path / "r.html").exists()


def test_two_processes_make_one_page(model_folders, tmp_path):
    page = tmp_path / "r.html"
    extra = ("--explain", str(page), "--batch-size", "2")
    assert main(arguments(model_folders, tmp_path, *extra)) == 0
    alone = page_of(page)
    page.unlink()
    processes = start_ranks(arguments(model_folders, tmp_path, *extra), 2, tmp_path)
    assert [code_of(process) for process in processes] == [0, 0]
    together = page_of(page)
    assert together.end == alone.end
    for one, other in zip(alone.sentences, together.sentences, strict=True):
        assert [figures[0] for figures in one["tokens"]] == [figures[0] for figures in other["tokens"]]


def test_standard_input_is_explained_as_it_streams(model_folders, tmp_path):
    page = tmp_path / "r.html"
    argv = arguments(model_folders, tmp_path, "--input", "-", "--output", "-", "--explain", str(page))
    with start_with_pipes(argv, tmp_path) as (process, stdin, stdout):
        for sentence in SENTENCES[:3]:
            stdin.write(sentence.encode() + b"\n")
            assert stdout.readline().endswith(b"\n")
        stdin.close()
        assert code_of(process) == 0
    assert [sentence["source"] for sentence in page_of(page).sentences] == SENTENCES[:3]


def test_an_interrupted_run_leaves_the_page_of_what_was_finished(model_folders, tmp_path):
    (tmp_path / "src.txt").write_text("\n".join(sorted(sample().source, key=len)[::-1] * 20) + "\n", encoding="utf-8")
    argv = arguments(model_folders, tmp_path, "--batch-size", "2", "--explain", str(tmp_path / "r.html"))
    process = start(argv, tmp_path / "log")
    wait_for_lines([tmp_path / "hyp.txt.journal"], 3)
    os.kill(process.pid, signal.SIGINT)
    assert code_of(process) == 130
    count = int(re.search(r"interrupted: ([\d,]+) of 800", (tmp_path / "log").read_text())[1].replace(",", ""))
    page = page_of(tmp_path / "r.html")
    assert count - len(page.sentences) in (0, 1)  # the interruption may come between the output and the page
    assert not page.end["whole"]


def test_as_text_it_takes_the_place_of_the_translations_on_standard_output(model_folders, tmp_path, capfd):
    assert main(arguments(model_folders, tmp_path)) == 0
    translations = (tmp_path / "hyp.txt").read_text(encoding="utf-8").split("\n")
    capfd.readouterr()
    assert main(arguments(model_folders, tmp_path, "--output", "-", "--explain", "-")) == 0
    blocks = capfd.readouterr().out.split("\n\n")
    assert len([block for block in blocks if block.strip()]) == len(SENTENCES) - 1
    shown = re.sub("[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", translations[0])
    assert blocks[0].split("\n")[:2] == [f"1  {SENTENCES[0]}", f"   {shown}"]
    assert main(arguments(model_folders, tmp_path, "--explain", "-")) == 0
    assert capfd.readouterr().out.startswith(f"1  {SENTENCES[0]}")
    assert (tmp_path / "hyp.txt").read_text(encoding="utf-8").split("\n") == translations
    assert main(arguments(model_folders, tmp_path, "--output", "/dev/null", "--beam", "2", "--explain", "-")) == 0
    assert capfd.readouterr().out.startswith(f"1  {SENTENCES[0]}")


def test_a_page_that_cannot_be_written_is_refused_before_anything_is(model_folders, tmp_path, capsys):
    for file, named in (
        ("/no/such/folder/r.html", "/no/such/folder/r.html: cannot be written"),
        (str(tmp_path / "src.txt"), "is also an input"),
        (str(tmp_path), "is a folder"),
    ):
        assert named in refusal(arguments(model_folders, tmp_path, "--explain", file), capsys)
    assert not (tmp_path / "hyp.txt").exists()
