"""Configuration files, dry runs and the record of a run."""

import hashlib
import json
import tomllib

import pytest

from minillama.errors import exit_code
from train import bpe, cpt, first_layers, merge, plan, plot, sft


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path, pairs_tsv, model_folders):
    """A configuration with all that a run needs but --output."""
    return written(
        tmp_path,
        f'''model = "{model_folders["A"]}"
train = ["{pairs_tsv / "train.tsv"}"]
valid = "{pairs_tsv / "valid.tsv"}"
prompt = "plain"
device = "cpu"
lr = 1e-3
batch-size = 4
epochs = 1
both_directions = true
''',
    )


def record(output):
    return json.loads((output / "run.json").read_text())


def test_a_run_is_what_the_file_says_and_the_command_line_wins(tmp_path, config, pairs_tsv):
    argv = ["--config", str(config), "--output", str(tmp_path / "out"), "--epochs", "2", "--no-both-directions"]
    assert sft.main(argv) == 0
    found = record(tmp_path / "out")
    assert (found["settings"]["lr"], found["settings"]["epochs"], found["steps"]) == (1e-3, 2, 16)
    assert found["data"]["both_directions"] is False
    digest = hashlib.sha256((pairs_tsv / "train.tsv").read_bytes()).hexdigest()
    assert found["sha256"][str(pairs_tsv / "train.tsv")] == digest
    assert {"python", "torch", "tokenizers"} <= found["versions"].keys()


def test_the_saved_configuration_repeats_the_run(tmp_path, config):
    assert sft.main(["--config", str(config), "--output", str(tmp_path / "one"), "--epochs", "2"]) == 0
    saved = tmp_path / "one" / "run.toml"
    assert tomllib.loads(saved.read_text())["batch_size"] == 4
    assert sft.main(["--config", str(saved), "--output", str(tmp_path / "two")]) == 0
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("learning_rte = 1", "unknown key 'learning_rte'"),
        ("warmup-step = 5", "did you mean 'warmup-steps'"),
        ("bach_size = 5", "did you mean 'batch-size'"),
        ('lr = "fast"', "--lr: invalid float value: 'fast'"),
        ("epochs = 1.5", "--epochs: invalid int value: '1.5'"),
        ('schedule = "linear"', "--schedule: invalid choice: 'linear'"),
        ("resume = 1", "must be true or false"),
        ("beta1 = 7", "--beta1 is 7.0; it must be between"),
        ("[optimizer]\nlr = 1", "unknown key 'optimizer'"),
        ("lr = = 1", "not TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line_before_any_work(tmp_path, model_folders, capsys, line, text):
    path = written(tmp_path, line)
    argv = ["--config", str(path), "--model", str(model_folders["A"]), "--train", "x", "--output", str(tmp_path / "o")]
    assert exit_code(lambda: sft.main(argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--epochs", "abc"), "argument --epochs: invalid int value: 'abc'"),
        (("--packing", "none"), "argument --packing: invalid choice: 'none'"),
        (("--bach-size=3",), "unknown argument --bach-size; did you mean --batch-size?"),
        (("more",), "unknown argument more"),
        (("--init", "config.json"), "argument --init: not allowed with argument --model"),
        (("--config",), "argument --config: expected one argument"),
        (("--lora-rank", "4", "--lora-targets", "q_proj,head"), "--lora-targets: unknown head"),
        (("--lora-rank", "4", "--lora-layers", "7"), "--lora-layers 7: the model has the layers 0-1"),
        (("--valid", "empty.tsv"), "--valid empty.tsv: no example in it"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    tmp_path, pairs_tsv, model_folders, capsys, monkeypatch, words, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.tsv").write_text("")
    argv = ["--model", str(model_folders["A"]), "--train", str(pairs_tsv / "train.tsv"), "--device", "cpu"]
    assert exit_code(lambda: sft.main([*argv, "--output", "out", *words])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [sft, cpt, plan, plot, merge, first_layers, bpe])
def test_help_has_examples(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert f"examples:\n  python -m {module.__name__} " in capsys.readouterr().out


def test_init_on_the_command_line_takes_the_place_of_the_files_model(tmp_path, config, model_folders, tokenizer_folder):
    shape = model_folders["A"] / "config.json"
    argv = ["--config", str(config), "--init", str(shape), "--tokenizer", str(tokenizer_folder)]
    assert sft.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert 'init = "' in (tmp_path / "out" / "run.toml").read_text()


@pytest.mark.parametrize("packing", ["off", "step", "epoch"])
def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, config, capsys, packing):
    argv = ["--config", str(config), "--output", str(tmp_path / "out"), "--dry-run", "--packing", packing]
    assert sft.main([*argv, "--sequence-length", "128"]) == 0
    assert not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for word in ("examples", "steps", "packing", "weights", "optimizer", "peak", "GiB", "sample 3"):
        assert word in text
    # both directions of the first pairs: a prompt, and the target with its end between the marks
    assert any(line.startswith("English: «") or line.startswith("English:«") for line in lines)
    assert text.count("«") == text.count("»") >= 3


def test_cpt_has_a_dry_run_too(tmp_path, model_folders, capsys):
    (tmp_path / "mono.txt").write_text("he lived a hard life.\n" * 50)
    argv = ["--model", str(model_folders["A"]), "--text", str(tmp_path / "mono.txt"), "--dry-run"]
    assert cpt.main([*argv, "--output", str(tmp_path / "out"), "--sequence-length", "64"]) == 0
    assert "epoch; 24 positions" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
