"""The benchmark's own sense: both systems do the same steps, every figure is there."""

import json
from dataclasses import replace

import pytest

from minillama.errors import exit_code
from train import bench


def test_every_figure_comes_out_and_the_curves_are_one(model_folders, capsys, monkeypatch):
    monkeypatch.setattr(bench, "WIDE", replace(bench.WIDE, vocab_size=2000))
    arguments = ["--model", str(model_folders["A"]), "--prompt", "plain", "--steps", "4", "--rounds", "1", "--json"]
    arguments += ["--batch-size", "8", "--sequences", "2", "--length", "16", "--device", "cpu", "--threads", "1"]
    assert bench.main([*arguments, "--lr", "1e-3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss_difference"] < 1e-5
    losses = result["sentence_pairs"]["losses_ours"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name in ("tokens_per_second_ratio", "target_tokens_per_second_ratio", "peak_memory_ratio"):
        assert result[name] > 0
    assert [row["layout"] for row in result["what_each_brings"]] == list(bench.LAYOUTS)
    bench.show(result)
    assert "target tokens/s" in capsys.readouterr().out


def test_an_unknown_shape_is_refused_with_those_that_are_known(capsys):
    assert exit_code(lambda: bench.main(["--shape", "llama-9b", "--device", "cpu"])) == 2
    assert "smollm2-135m" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--rounds"])
def test_nothing_to_measure_is_refused(option, capsys):
    assert exit_code(lambda: bench.main([option, "0"])) == 2
    assert option in capsys.readouterr().err
