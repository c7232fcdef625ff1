"""Predicted memory, against what autograd saves and against measured peaks."""

import json
from dataclasses import asdict

import pytest
import torch
from peak import measured_peak
from test_loss import saved_bytes

from minillama import InputError, Llama, LlamaConfig
from train import plan
from train.config import Settings
from train.lora import add_adapters
from train.memory import memory_of, shape_of
from train.packing import Example, pack

# V, D, F, layers, H, K, C
SMALL = LlamaConfig(1000, 256, 640, 4, 8, 2, 32, tie_word_embeddings=True)
# 19.5 million parameters: large enough that a peak is far above what a process holds anyway.
LARGE = asdict(LlamaConfig(16000, 512, 1408, 4, 8, 2, 64, max_position_embeddings=4096, tie_word_embeddings=True))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dtype": "bfloat16"},
        {"compute_dtype": "bfloat16"},
        {"lora_rank": 4, "lora_targets": "q_proj,v_proj"},
        {"lora_rank": 4, "dtype": "bfloat16"},
        {"lora_rank": 8, "lora_layers": "1,3"},
        {"lora_rank": 4, "compute_dtype": "bfloat16"},
    ],
)
def test_activations_are_what_autograd_saves(given):
    settings = Settings(epochs=1, **given)
    model = add_adapters(Llama(SMALL).init_weights(0).to(getattr(torch, settings.dtype)), settings)
    batch = pack([Example(torch.randint(2, 900, (257,)).tolist(), 1)])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(settings.compute_dtype)):
        saved = saved_bytes(model, batch)
    assert memory_of(SMALL, settings, 256, 256).activations == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "given", "positions", "ranks"),
    [
        ({"vocab_size": 8000, "num_hidden_layers": 2}, {}, 256, 1),
        slow({}, {}, 768, 1),
        slow({"vocab_size": 48000, "num_hidden_layers": 3, "tie_word_embeddings": False}, {"batch_size": 2}, 128, 1),
        slow({"head_dim": 96}, {"release_gradients": True, "clip": 0.0, "optimizer_state": "bfloat16"}, 384, 1),
        slow({"num_hidden_layers": 8}, {"compute_dtype": "bfloat16"}, 768, 1),
        slow({"num_hidden_layers": 8}, {"compute_dtype": "bfloat16", "checkpoint_activations": True}, 2048, 1),
        slow({"num_hidden_layers": 6}, {"lora_rank": 8, "checkpoint_activations": True}, 512, 1),
        slow({"num_hidden_layers": 8}, {"batch_size": 4}, 192, 4),
        slow({"num_hidden_layers": 6, "head_dim": 96}, {"batch_size": 4, "checkpoint_activations": True}, 768, 2),
        slow({"vocab_size": 48000, "num_hidden_layers": 3, "tie_word_embeddings": False}, {"batch_size": 2}, 64, 2),
    ],
)
def test_predicted_peaks_are_measured_within_a_tenth(shape, given, positions, ranks):
    config = {**LARGE, **shape}
    measured = measured_peak(config, given, positions, ranks)
    predicted = memory_of(LlamaConfig(**config), Settings(epochs=1, **given), positions, positions, ranks).peak
    print(
        f"\n{shape} {given} {positions} positions, {ranks} ranks: "
        f"measured {measured / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f} MiB"
    )
    assert measured > 120 << 20
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_plan_reads_a_folder_or_needs_no_file_for_a_known_model(model_folders, capsys):
    assert plan.main(["--model", str(model_folders["A"]), "--gpu-memory", "8", "--sequence-length", "96"]) == 0
    assert "It fits into 8 GiB." in capsys.readouterr().out
    argv = ["--model", "meta-llama/Llama-3.2-1B", "--gpu-memory", "24"]
    assert plan.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 1_235_814_400 * 4  # the model card's 1.24 B parameters, float32
    assert found["optimizer"] == 2 * found["weights"]
    assert not found["fits"]
    assert plan.main(argv) == 0
    assert "does not fit into 24 GiB" in capsys.readouterr().out
    assert plan.main([*argv, "--lora-rank", "16", "--micro-batch-size", "1"]) == 0
    assert "It fits into 24 GiB" in capsys.readouterr().out


def test_the_known_shapes_have_their_models_numbers_of_parameters():
    cards = {"3.2-1B": 1_235_814_400, "3.2-3B": 3_212_749_824, "3.1-8B": 8_030_261_248}  # as the hub counts them
    for name, parameters in cards.items():
        with torch.device("meta"):
            model = Llama(shape_of(f"meta-llama/Llama-{name}"))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("ranks", "positions"), [(1, 8192), (3, 4096), (8, 2048)])
def test_each_rank_computes_its_share_of_the_sequences(ranks, positions, capsys):
    argv = ["--model", "meta-llama/Llama-3.2-1B", "--gpu-memory", "80", "--ranks", str(ranks), "--batch-size", "4"]
    assert plan.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == positions


@pytest.mark.parametrize(
    "words", [("--gpu-memory", "nan"), ("--gpu-memory", "0"), ("--ranks", "0"), ("--lora-targets", "head")]
)
def test_wrong_arguments_of_plan_are_refused(words):
    with pytest.raises(InputError, match=words[0]):
        plan.main(["--model", "meta-llama/Llama-3.2-1B", "--gpu-memory", "24", *words])


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"nobody/model.*meta-llama/Llama-3\.2-1B"):
        plan.main(["--model", "nobody/model", "--gpu-memory", "24"])


def test_ranks_share_weights_gradients_and_optimizer():
    shape = shape_of("meta-llama/Llama-3.1-8B")
    one, eight = (memory_of(shape, Settings(epochs=1), 2048, 2048, ranks, "cuda") for ranks in (1, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(eight, name) == getattr(one, name) // 8
    assert one.peak / 8 < eight.peak < one.peak / 2
