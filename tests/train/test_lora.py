"""Adapters: equal logits in peft, equal logits merged, and only they are trained."""

import json

import pytest
import torch
from tiny import tiny_model

from minillama import InputError, Llama
from minillama.errors import exit_code
from train import merge, sft
from train.config import Settings
from train.lora import LoraLinear, add_adapters, layer_numbers

TOKENS = torch.tensor([[0, 5, 80, 200, 301, 7, 9]])


def arguments(folder, model, output, *extra):
    return [
        *("--model", str(model), "--train", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv")),
        *("--prompt", "plain", "--device", "cpu", "--lr", "3e-2", "--epochs", "2", "--output", str(output)),
        *("--lora-rank", "4", *extra),
    ]


def logits_in_peft(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--lora-targets", "q_proj,v_proj", "--lora-alpha", "3"),
        ("--lora-layers", "1", "--lora-targets", "down_proj"),
    ],
)
def test_an_adapter_gives_the_same_logits_in_peft_and_merged(tmp_path, pairs_tsv, model_folders, extra):
    base, adapter = model_folders["A"], tmp_path / "adapter"
    assert sft.main(arguments(pairs_tsv, base, adapter, *extra)) == 0
    assert not (adapter / "model.safetensors").exists()
    theirs = logits_in_peft(base, adapter)
    with torch.no_grad():
        before = Llama.from_pretrained(base)(TOKENS)
    assert (theirs - before).abs().max() > 1e-2  # it has learned something
    argv = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert merge.main(argv) == 0
    assert sft.main(arguments(pairs_tsv, base, tmp_path / "at-once", "--merge", *extra)) == 0
    for folder in ("merged", "at-once"):
        with torch.no_grad():
            assert torch.allclose(Llama.from_pretrained(tmp_path / folder)(TOKENS), theirs, atol=1e-4)
        assert (tmp_path / folder / "prompt.toml").exists()


def test_a_fresh_adapter_changes_nothing_and_trains_alone():
    model, plain = tiny_model(4), tiny_model(4)
    add_adapters(model, Settings(epochs=1, lora_rank=3, lora_targets="q_proj,up_proj", lora_layers="1"))
    assert torch.equal(model(TOKENS), plain(TOKENS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ends = ("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "mlp.up_proj.lora_A", "mlp.up_proj.lora_B")
    assert trained == {f"model.layers.1.{end}.weight" for end in ends}


def test_gradients_of_an_adapter_are_those_of_the_merged_weight():
    """dL/dB = scale · dL/dW Aᵀ and dL/dA = scale · Bᵀ dL/dW, in float64."""
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5, bias=False), rank=2, scale=1.5).double()
    with torch.no_grad():
        for adapter in (layer.lora_A, layer.lora_B):
            adapter.weight.normal_()
    x = torch.randn(7, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = layer.merged().weight.detach().requires_grad_()
    (x @ weight.T).square().sum().backward()
    assert torch.allclose(layer.lora_B.weight.grad, 1.5 * weight.grad @ layer.lora_A.weight.T)
    assert torch.allclose(layer.lora_A.weight.grad, 1.5 * layer.lora_B.weight.T @ weight.grad)


def test_a_killed_adapter_run_resumes_and_another_base_is_refused(tmp_path, pairs_tsv, model_folders, crash):
    base, output = model_folders["A"], tmp_path / "two"
    assert sft.main(arguments(pairs_tsv, base, tmp_path / "one")) == 0
    with crash(12):
        sft.main(arguments(pairs_tsv, base, output))
    with pytest.raises(InputError, match="frozen_weights"):
        sft.main(arguments(pairs_tsv, model_folders["B"], output, "--resume"))
    assert sft.main(arguments(pairs_tsv, base, output, "--resume")) == 0
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_layer_numbers_are_ranges_within_the_model():
    assert layer_numbers("0-2,5", 6) == [0, 1, 2, 5]
    assert layer_numbers("all", 3) == [0, 1, 2]
    for wrong in ("6", "a", "1-", "", "-1", "0-9"):
        with pytest.raises(InputError, match="--lora-layers"):
            layer_numbers(wrong, 6)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (("--lora-targets", "q_proj,lm_head"), "unknown lm_head"),
        (("--lora-layers", "9"), "layers 0-1"),
        (("--lora-rank", "0", "--merge"), "--merge without --lora-rank"),
    ],
)
def test_wrong_adapters_are_refused_in_one_line(tmp_path, pairs_tsv, model_folders, capsys, extra, text):
    argv = arguments(pairs_tsv, model_folders["A"], tmp_path / "out", *extra)
    assert exit_code(lambda: sft.main(argv)) == 2
    assert text in capsys.readouterr().err


def test_an_adapter_that_is_no_plain_lora_is_not_merged(tmp_path, model_folders):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    argv = ["--model", str(model_folders["A"]), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="use_dora"):
        merge.main(argv)
