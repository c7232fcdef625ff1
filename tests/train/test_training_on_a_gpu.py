"""A training run on a GPU: the same bits again after a crash, and the losses of the CPU: `pytest -m gpu`."""

import json

import pytest
import torch

from train import sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def arguments(folder, model, output, *extra):
    return [
        *("--model", str(model), "--train", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv")),
        *("--prompt", "plain", "--lr", "1e-3", "--epochs", "3", "--checkpoint-every", "5", "--output", str(output)),
        *extra,
    ]


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("valid_loss")) for line in lines]


@pytest.mark.parametrize("packing", ["off", "step", "epoch"])
def test_a_run_that_died_goes_on_to_the_same_bits(tmp_path, pairs_tsv, model_folders, crash, packing):
    extra = ("--device", "cuda", "--packing", packing, "--sequence-length", "64")
    assert sft.main(arguments(pairs_tsv, model_folders["A"], tmp_path / "one", *extra)) == 0
    with crash(8):
        sft.main(arguments(pairs_tsv, model_folders["A"], tmp_path / "two", *extra))
    assert sft.main(arguments(pairs_tsv, model_folders["A"], tmp_path / "two", *extra, "--resume")) == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_gpu_has_the_losses_of_the_cpu(tmp_path, pairs_tsv, model_folders):
    for device in ("cpu", "cuda"):
        argv = arguments(pairs_tsv, model_folders["A"], tmp_path / device, "--device", device)
        assert sft.main(argv) == 0
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)


@pytest.mark.parametrize(
    "extra",
    [
        ("--compute-dtype", "bfloat16", "--checkpoint-activations"),
        ("--dtype", "bfloat16", "--optimizer-state", "bfloat16", "--release-gradients", "--clip", "0"),
        ("--compile",),
        ("--lora-rank", "4"),
    ],
)
def test_what_saves_memory_or_time_learns_too(tmp_path, pairs_tsv, model_folders, extra):
    argv = arguments(pairs_tsv, model_folders["A"], tmp_path / "out", "--device", "cuda", "--epochs", "6", *extra)
    assert sft.main(argv) == 0
    found = losses(tmp_path / "out")
    assert sum(found[-8:]) < sum(found[:8])
