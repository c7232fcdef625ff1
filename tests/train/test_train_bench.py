"""The benchmark's own sense: both systems do the same steps, every figure is there."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import TINY, tiny_model

from minillama.errors import exit_code
from train import bench, bench_parts


def test_every_figure_comes_out_and_the_curves_are_one(tmp_path, model_folders, capsys, monkeypatch):
    for module in (bench, bench_parts):
        monkeypatch.setattr(module, "WIDE", replace(bench.WIDE, vocab_size=2000))
    monkeypatch.setitem(bench_parts.ROOF_WIDTH, "cpu", 256)
    arguments = ["--model", str(model_folders["A"]), "--prompt", "plain", "--steps", "4", "--rounds", "1", "--json"]
    arguments += ["--curve-batch-size", "8", "--sequences", "2", "--length", "16", "--device", "cpu", "--threads", "1"]
    assert bench.main([*arguments, "--lr", "1e-3", "--output", str(tmp_path / "results")]) == 0
    result = json.loads(capsys.readouterr().out)
    (saved,) = (tmp_path / "results").iterdir()
    assert json.loads(saved.read_text()) == result
    assert result["loss_difference"] < 1e-5
    losses = result["loss_curves"]["ours"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name in ("tokens_per_second_ratio", "target_tokens_per_second_ratio", "peak_memory_ratio"):
        assert result[name] > 0
    assert [row["layout"] for row in result["what_each_brings"]] == list(bench_parts.LAYOUTS)
    bench.show(result)
    assert "target tokens/s" in capsys.readouterr().out


def test_an_unknown_shape_is_refused_with_those_that_are_known(capsys):
    assert exit_code(lambda: bench.main(["--shape", "llama-9b", "--device", "cpu"])) == 2
    assert "smollm2-135m" in capsys.readouterr().err


def test_operations_are_those_that_pytorch_counts_and_the_visible_half_of_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, length = tiny_model(0), 24
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(3, length, dtype=torch.int64)).sum().backward()
    every_pair = bench_parts.flops_per_token(TINY, 2 * length - 1)  # T keys are counted, (T + 1) / 2 are seen
    assert counter.get_total_flops() == 3 * length * every_pair


@pytest.mark.parametrize("option", ["--steps", "--rounds", "--threads"])
def test_nothing_to_measure_is_refused(option, capsys):
    assert exit_code(lambda: bench.main([option, "-1"])) == 2
    assert option in capsys.readouterr().err
