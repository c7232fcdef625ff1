"""Training: learning rates, early stopping, folders that others load, and what is refused."""

import json
import math
import os

import pytest
import torch
from random_examples import examples_of
from tiny import TINY, tiny_model

from corpora import Prompt, sample
from minillama import InputError, Llama
from minillama.config import LlamaConfig
from minillama.errors import exit_code
from train import cpt, sft
from train.config import Settings
from train.metrics import Reporter
from train.optim import learning_rate
from train.packing import collate
from train.trainer import Trainer, target_loss


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def sft_arguments(folder, model, *extra):
    return [
        *("--model", str(model), "--train", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv")),
        *("--source", "ja", "--target", "en", "--prompt", "plain", "--device", "cpu", "--lr", "1e-3"),
        *("--batch-size", "4", "--epochs", "2", *extra),
    ]


def test_learning_rates_warm_up_and_then_stay_or_follow_a_cosine():
    constant = Settings(epochs=1, lr=0.1, warmup_steps=4)
    assert [learning_rate(constant, step, 10) for step in (1, 2, 4, 5, 10)] == pytest.approx(
        [0.025, 0.05, 0.1, 0.1, 0.1]
    )
    cosine = Settings(epochs=1, lr=0.1, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.1 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.01)


def test_training_learns_and_transformers_loads_what_it_saved(tmp_path, pairs_tsv, model_folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "out"
    assert sft.main(sft_arguments(pairs_tsv, model_folders["A"], "--epochs", "6", "--output", str(output))) == 0
    losses = [row["loss"] for row in metrics_of(output) if "loss" in row]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    tokens = torch.tensor([[0, 5, 80, 200, 301]])
    with torch.no_grad():
        ours = Llama.from_pretrained(output)(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(output)(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert AutoTokenizer.from_pretrained(output).encode("student", add_special_tokens=False)
    assert (output / "prompt.toml").exists()


def test_cpt_starts_from_a_configuration_and_saves_in_another_dtype(tmp_path, tokenizer_folder):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LlamaConfig.to_dict(TINY)))
    (tmp_path / "mono.txt").write_text("\n".join(sample().target), encoding="utf-8")
    argv = ["--init", str(config), "--tokenizer", str(tokenizer_folder), "--text", str(tmp_path / "mono.txt")]
    argv += ["--lr", "1e-3", "--epochs", "1", "--save-dtype", "bfloat16", "--device", "cpu"]
    assert cpt.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert Llama.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert cpt.main([*argv, "--output", str(tmp_path / "out"), "--resume"]) == 0


def test_early_stopping_keeps_the_best_weights(tmp_path):
    settings = Settings(epochs=50, lr=0.05, batch_size=4, patience=2, keep="best")
    model = tiny_model(4)
    outcome = Trainer(model, examples_of(8), examples_of(8, 5), settings, tmp_path).run(False, Reporter())
    valid = [(row["valid_loss"], row["step"]) for row in metrics_of(tmp_path) if "valid_loss" in row]
    assert outcome.step < 100
    assert (outcome.best_loss, outcome.best_step) == min(valid)
    assert valid[-1][1] - outcome.best_step == 4
    held_out = [collate(sorted(examples_of(8, 5), key=lambda e: len(e.tokens))[i : i + 4]) for i in (0, 4)]
    with torch.no_grad():
        loss = sum(float(target_loss(model, batch)) for batch in held_out) / sum(len(b.labels_M) for b in held_out)
    assert loss == pytest.approx(outcome.best_loss, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model = tiny_model(4)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(InputError, match="step 1: loss nan"):
        Trainer(model, examples_of(8), [], Settings(epochs=1), tmp_path).run(False, Reporter())


def test_an_output_that_holds_something_is_refused_without_resume(tmp_path, pairs_tsv, model_folders, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    arguments = sft_arguments(pairs_tsv, model_folders["A"], "--output", str(tmp_path / "out"))
    assert exit_code(lambda: sft.main(arguments)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("beta1", "1.5"), ("seed", "-1"), ("max-length", "1"), ("lr", "0"), ("keep", "best"), ("epochs", "0")],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    tmp_path, pairs_tsv, model_folders, capsys, option, value
):
    arguments = ["--model", str(model_folders["A"]), "--train", str(pairs_tsv / "train.tsv"), "--prompt", "plain"]
    arguments += ["--output", str(tmp_path / "out"), f"--{option}", value]
    assert exit_code(lambda: sft.main(arguments)) == 2
    assert f"--{option}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_in_one_line(tmp_path, pairs_tsv, model_folders, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = sft_arguments(pairs_tsv, model_folders["A"], "--output", str(tmp_path / "file" / "out"))
    assert exit_code(lambda: sft.main(arguments)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_chat_format_of_training_travels_with_the_model(tmp_path, pairs_tsv, model_folders):
    output = tmp_path / "out"
    assert sft.main(sft_arguments(pairs_tsv, model_folders["A"], "--chat", "plain", "--output", str(output))) == 0
    assert Prompt.load(output).chat == "plain"
    assert Prompt.load(output).templates == Prompt.load("plain").templates
