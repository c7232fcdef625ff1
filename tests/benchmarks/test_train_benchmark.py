"""The training benchmark: both systems do the same steps, and every figure of the contract is printed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from benchmarks import train
from minillama.errors import exit_code


def test_every_figure_is_printed_and_the_losses_are_equal(tmp_path, model_folders, capsys, monkeypatch):
    """In threads: processes take long to start, and only their memory differs."""
    monkeypatch.setattr(train, "WIDE", replace(train.WIDE, vocab_size=2000))
    monkeypatch.setattr(
        train, "ProcessPoolExecutor", lambda count, context, **options: ThreadPoolExecutor(count, **options)
    )
    monkeypatch.setattr(train.os, "dup2", lambda *_: None)
    arguments = ["--model", str(model_folders["A"]), "--prompt", "plain", "--steps", "4", "--rounds", "1", "--json"]
    arguments += ["--curve-batch-size", "8", "--sequences", "2", "--length", "16", "--device", "cpu"]
    assert train.main([*arguments, "--lr", "1e-3", "--output", str(tmp_path / "results")]) == 0
    result = json.loads(capsys.readouterr().out)
    (saved,) = (tmp_path / "results").iterdir()
    assert json.loads(saved.read_text()) == result
    assert result["loss_difference"] < 1e-5
    losses = [ours for ours, _ in result["losses"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name in ("tokens_per_second_ratio", "target_tokens_per_second_ratio", "peak_memory_ratio"):
        assert result[name] > 0


@pytest.mark.parametrize(
    ("arguments", "text"), [(["--shape", "llama-9b"], "Llama-3.2-1B"), (["--rounds", "0"], "--rounds")]
)
def test_wrong_arguments_are_refused_in_one_line(arguments, text, capsys):
    assert exit_code(lambda: train.main([*arguments, "--device", "cpu"])) == 2
    assert text in capsys.readouterr().err


@pytest.mark.gpu
def test_the_benchmark_runs_unattended_on_a_gpu(tmp_path, model_folders, capsys):
    argv = ["--model", str(model_folders["A"]), "--prompt", "plain", "--steps", "4", "--rounds", "2", "--json"]
    argv += ["--device", "cuda", "--sequences", "2", "--length", "64", "--output", str(tmp_path)]
    assert train.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["loss_difference"] < 1e-3
