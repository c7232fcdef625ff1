"""`python -m decode.collab` as a user meets it: outputs, reports, streaming, interruption, refusals in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from processes import code_of, start, start_with_pipes, wait_for_lines

from corpora import sample
from corpora.pairs import one_line
from decode import Ensemble, translate
from decode.collab import main
from decode.pipeline.members import open_members
from minillama import InputError, Llama
from minillama.errors import exit_code

PAIRS = sample()


@pytest.fixture
def texts(tmp_path):
    """Six sentences of the sample and their references."""
    (tmp_path / "src.txt").write_text("\n".join(PAIRS.source[:6]) + "\n", encoding="utf-8")
    (tmp_path / "ref.txt").write_text("\n".join(PAIRS.target[:6]) + "\n", encoding="utf-8")
    return tmp_path


def arguments(folders, texts, *extra, names=("A", "C"), combine=None):
    models = [part for name in names for part in ("--model", f"{name}={folders[name]}")]
    combination = ["--combine", combine] if combine else []
    languages = ["--source", "ja", "--target", "en", "--input", str(texts / "src.txt"), "--max-new-tokens", "12"]
    return [*models, *combination, *languages, *extra]


def refusal(argv, capsys):
    """The one line that a command line is refused with: exit code 2, nothing on standard output, nothing written."""
    folder = Path(argv[argv.index("--input") + 1]).parent
    outputs = {"--output": "refused.txt", "--report": "refused.json", "--details": "refused.jsonl"}
    argv = [*argv, *(part for o, name in outputs.items() if o not in argv for part in (o, str(folder / name)))]

    def files():
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    before = files()
    assert exit_code(lambda: main(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    assert files() == before
    return captured.err


def test_the_output_is_that_of_the_python_interface_line_by_line(model_folders, texts):
    assert main(arguments(model_folders, texts, "--output", str(texts / "hyp.txt"), combine="A + 0.5*C")) == 0
    members = open_members({name: str(model_folders[name]) for name in ("A", "C")}, None, None)
    models = {name: Llama.from_pretrained(model_folders[name]) for name in ("A", "C")}
    prompts = [members[0].encode(sentence, "ja", "en") for sentence in PAIRS.source[:6]]
    result = translate(Ensemble(models, "A + 0.5*C"), prompts, max_new_tokens=12)
    expected = [one_line(members[0].tokenizer.decode(tokens)).strip() for tokens in result.tokens]
    assert (texts / "hyp.txt").read_text(encoding="utf-8").split("\n") == [*expected, ""]


def test_the_report_has_what_the_contract_names_and_sacrebleus_own_scores(model_folders, texts):
    hyp, report = texts / "hyp.txt", texts / "run.json"
    extra = ("--reference", str(texts / "ref.txt"), "--output", str(hyp), "--report", str(report))
    assert main(arguments(model_folders, texts, *extra)) == 0
    found = json.loads(report.read_text())
    named = """sentences output_tokens seconds load_seconds tokens_per_second sentences_per_second steps combine weights
               models device dtype versions bleu chrf bleu_signature chrf_signature"""
    assert set(named.split()) <= found.keys()
    assert found["sentences"] == 6
    assert found["weights"] == {"A": 1.0, "C": 1.0}
    hypotheses = hyp.read_text(encoding="utf-8").splitlines()
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, [PAIRS.target[:6]]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, [PAIRS.target[:6]]).score


def test_blank_lines_stay_blank_and_in_place(model_folders, texts):
    (texts / "src.txt").write_text(f"{PAIRS.source[0]}\n\n{PAIRS.source[1]}\n", encoding="utf-8")
    assert main(arguments(model_folders, texts, "--output", str(texts / "hyp.txt"), names=("A",))) == 0
    lines = (texts / "hyp.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4
    assert lines[1] == lines[3] == ""
    assert all((lines[0], lines[2]))


def test_an_empty_input_is_an_empty_output(model_folders, texts):
    (texts / "src.txt").write_text("")
    assert main(arguments(model_folders, texts, "--output", str(texts / "hyp.txt"))) == 0
    assert (texts / "hyp.txt").read_text() == ""


def stream(folders, *extra):
    """The command line of a run of standard input."""
    options = ["--source", "ja", "--target", "en", "--input", "-", "--max-new-tokens", "8"]
    return ["--model", f"A={folders['A']}", *options, *extra]


def test_standard_input_is_answered_line_by_line_before_it_ends(model_folders, tmp_path):
    with start_with_pipes(stream(model_folders), tmp_path) as (process, stdin, stdout):
        for sentence in PAIRS.source[:3]:
            stdin.write(sentence.encode() + b"\n")
            assert stdout.readline().endswith(b"\n")
        stdin.close()
        assert code_of(process) == 0
        assert stdout.read() == b""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_the_finished_sentences_and_counts_them(model_folders, texts, kind):
    # The longest sentences start first: with the longest in the first line, output begins at once.
    (texts / "src.txt").write_text("\n".join(sorted(PAIRS.source, key=len)[::-1] * 5) + "\n", encoding="utf-8")
    output = texts / "hyp.txt"
    extra = ("--output", str(output), "--batch-size", "2", "--max-new-tokens", "40")
    process = start(arguments(model_folders, texts, *extra, names=("A",)), texts / "log")
    wait_for_lines([output], 0)
    os.kill(process.pid, kind)
    assert code_of(process) == 130
    error = (texts / "log").read_text()
    assert "Traceback" not in error
    lines = output.read_text(encoding="utf-8").split("\n")
    count = int(error.split("interrupted: ")[1].split(" of 200")[0])
    gaps = int(error.split("; ")[-1].split(" empty")[0]) if "empty lines" in error else 0
    assert len(lines) - 1 == count + gaps


def test_members_may_have_prompts_of_their_own(model_folders, texts, tmp_path):
    report = tmp_path / "run.json"
    extra = ("--report", str(report), "--output", str(tmp_path / "h"), "--prompt", "C=plain", "--prompt", "paper-user")
    assert main(arguments(model_folders, texts, *extra)) == 0
    assert json.loads(report.read_text())["prompts"] == {"A": "paper-user", "C": "plain"}


@pytest.mark.parametrize("mode", ["truncate", "skip"])
def test_a_sentence_beyond_the_context_is_truncated_or_skipped_when_asked(model_folders, texts, mode):
    (texts / "src.txt").write_text("\n".join([PAIRS.source[0], "長い" * 300, PAIRS.source[1]]) + "\n", encoding="utf-8")
    report = texts / "run.json"
    extra = ("--too-long", mode, "--output", str(texts / "hyp.txt"), "--report", str(report))
    assert main(arguments(model_folders, texts, *extra)) == 0
    found = json.loads(report.read_text())
    assert found["skipped_lines"] == ([2] if mode == "skip" else [])
    assert found["truncated_lines"] == ([2] if mode == "truncate" else [])
    assert bool((texts / "hyp.txt").read_text(encoding="utf-8").split("\n")[1]) == (mode == "truncate")


def test_refused_expressions_exit_with_2_and_one_line(model_folders, texts, capsys):
    for combine, named in [
        ("A + X", "X is unknown"),
        ("A", "C is given"),
        ("A + C/2", "no division"),
        ("(A + C", "'(' was never closed"),
        ("A * C", "can only be multiplied by a number"),
    ]:
        assert named in refusal(arguments(model_folders, texts, combine=combine), capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: (t / "src.txt").write_bytes(b"fine\n\xff\xfe bad\n"), "src.txt:2"),
        (lambda t: (t / "src.txt").unlink(), "src.txt"),
        (lambda t: (t / "ref.txt").write_text("one\n"), "6 lines"),
        (lambda t: (t / "src.txt").write_text("長い" * 300 + "\n" + "x\n" * 5, encoding="utf-8"), "src.txt:1"),
    ],
)
def test_bad_texts_are_refused_and_nothing_is_written(model_folders, texts, capsys, change, named):
    change(texts)
    assert named in refusal(arguments(model_folders, texts, "--reference", str(texts / "ref.txt")), capsys)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--device", "cuda"), "no CUDA device here"),
        (("--device", "abacus"), "abacus"),
        (("--output", "/no/such/folder/hyp.txt"), "/no/such/folder/hyp.txt: cannot be written"),
        (("--report", "/no/such/folder/run.json"), "/no/such/folder/run.json: cannot be written"),
        (("--output", "SRC"), "is also an input"),
        (("--report", "-"), "give a file"),
        (("--combine", ""), "expected models, numbers"),
        (("--device", "meta"), "use cpu, cuda"),
        (("--chat", "llama3"), "<|eot_id|>"),
        (("--prompt", "nonsense"), "nonsense"),
        (("--prompt", "X=plain"), "X is no model"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--source", "xx-unknown"), "xx-unknown"),
        (("--batch-size", "many"), "--batch-size: invalid int value: 'many'"),
        (("--too-long", "drop"), "choose from"),
        (("--btach-size", "4"), "did you mean --batch-size?"),
    ],
)
def test_bad_options_are_refused(model_folders, texts, capsys, extra, named, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    extra = [str(texts / "src.txt") if part == "SRC" else part for part in extra]
    assert named in refusal(arguments(model_folders, texts, *extra), capsys)


def test_folders_that_are_no_models_are_refused(model_folders, texts, capsys, tmp_path):
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(model_folders["A"]).iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, named in [(tmp_path / "nowhere", "no such folder"), (empty, "not a model"), (cut, "truncated")]:
        error = refusal(arguments({"A": folder, "C": model_folders["C"]}, texts), capsys)
        assert named in error
        assert str(folder) in error


def test_different_vocabularies_are_refused_with_the_entries_that_differ(model_folders, texts, capsys, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(model_folders["A"]).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    by_id = {index: piece for piece, index in vocabulary.items()}
    vocabulary[by_id[300]], vocabulary[by_id[301]] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    error = refusal(arguments({"A": model_folders["A"], "C": other}, texts), capsys)
    assert "2 ids differ, 300: " in error


def test_a_name_given_twice_or_without_a_folder_is_refused(model_folders, texts):
    with pytest.raises(InputError, match="given twice"):
        main(arguments(model_folders, texts, names=("A", "A")))
    with pytest.raises(InputError, match="expected NAME=DIR"):
        main(
            ["--model", str(model_folders["A"]), "--source", "ja", "--target", "en", "--input", str(texts / "src.txt")]
        )


def test_the_report_does_not_replace_the_translations_or_what_is_no_file(model_folders, texts, capsys):
    both = str(texts / "both")
    (texts / "both").write_text("mine")
    assert "both" in refusal(arguments(model_folders, texts, "--output", both, "--report", both), capsys)
    extra = ("--output", str(texts / "hyp.txt"), "--report", "/dev/null")
    assert main(arguments(model_folders, texts, *extra, names=("A",))) == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("bad", [b"\xff\n", "長い".encode() * 300 + b"\n"])
def test_lines_before_a_bad_one_on_standard_input_are_still_translated(model_folders, tmp_path, bad):
    with start_with_pipes(stream(model_folders), tmp_path) as (process, stdin, stdout):
        good = "".join(f"{sentence}\n" for sentence in PAIRS.source[:2]).encode()
        stdin.write(good + bad + good)
        stdin.close()
        output = stdout.read()
        assert code_of(process) == 2
    assert output.count(b"\n") == 2
    assert "standard input:3" in (tmp_path / "log").read_text().strip().split("\n")[-1]


@pytest.mark.parametrize("command", ["decode.collab", "decode.score"])
def test_help_and_a_mistyped_option_need_no_pytorch(command):
    script = f"""
import sys
from {command} import main
for argv in (["--help"], ["--inptu"]):
    try:
        main(argv)
    except (SystemExit, ValueError) as end:
        print(end, file=sys.stderr)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
    assert "--help shows the options" in done.stderr
