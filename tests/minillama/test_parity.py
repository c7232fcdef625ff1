"""Our Llama computes what transformers' Llama computes, with and without a cache, for any shape of model and batch."""

import copy
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from minillama import KVCache, Llama, LlamaConfig
from minillama.model import rope_frequencies

SEEDS = range(14)
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"config{seed}")
def models(request, random_model, tmp_path_factory):
    """(transformers' model, ours loaded from the folder that it saved)"""
    reference, folder = random_model(request.param), tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return reference, Llama.from_pretrained(folder)


@pytest.fixture
def pair(models):
    return *models, torch.Generator().manual_seed(0)


def random_tokens(model, generator, rows, count):
    return torch.randint(model.config.vocab_size, (rows, count), generator=generator)


@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(pair):
    reference, model, generator = pair
    tokens_BT = random_tokens(model, generator, 3, 40)
    expected_BTV = reference(tokens_BT).logits

    plain_BTV = model(tokens_BT)
    assert plain_BTV.shape == expected_BTV.shape
    assert (plain_BTV - expected_BTV).abs().max() < TOLERANCE
    assert expected_BTV.std() > 0.1  # the comparison is of something

    # Prefill in uneven chunks, then token by token.
    cache = KVCache(model.config, 3, 40)
    chunks, start = [], 0
    for count in (7, 1, 16, 11, 1, 1, 1, 1, 1):
        chunks.append(model(tokens_BT[:, start : start + count], cache=cache))
        start += count
    assert cache.lengths_B.tolist() == [40, 40, 40]
    assert (torch.cat(chunks, dim=1) - expected_BTV).abs().max() < TOLERANCE


@torch.no_grad()
def test_hidden_times_output_weight_is_the_logits(pair):
    reference, model, generator = pair
    tokens_BT = random_tokens(model, generator, 2, 9)
    hidden_BTD = model.hidden(tokens_BT)
    assert (hidden_BTD - reference.model(tokens_BT).last_hidden_state).abs().max() < TOLERANCE
    assert torch.equal(hidden_BTD @ model.output_weight.T, model(tokens_BT))


@torch.no_grad()
def test_ragged_sequences_equal_each_sequence_alone(pair):
    """A right-padded prefill is truncated to each sequence's length; then every step has positions of its own."""
    reference, model, generator = pair
    lengths_B = torch.tensor([5, 17, 1, 11])
    steps = 5
    tokens_BT = random_tokens(model, generator, 4, 17 + steps)
    cache = KVCache(model.config, 4, 32)
    model(tokens_BT[:, :17], cache=cache)
    cache.lengths_B.copy_(lengths_B)
    alone_BTV = reference(tokens_BT).logits

    for step in range(steps):
        positions_B1 = lengths_B[:, None] + step
        # Every other step leaves the positions to the cache, which must be the same.
        logits_BV = model(tokens_BT.gather(1, positions_B1), cache=cache, positions=positions_B1 if step % 2 else None)
        expected_BV = alone_BTV[torch.arange(4), positions_B1[:, 0]]
        assert (logits_BV[:, 0] - expected_BV).abs().max() < TOLERANCE, step


@torch.no_grad()
def test_greedy_tokens_equal_transformers_generate(pair):
    reference, model, generator = pair
    prompt = random_tokens(model, generator, 1, 6)
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, 6:]
    cache = KVCache(model.config, 1, 64)
    logits, produced = model(prompt, cache=cache), []
    for _ in range(12):
        produced.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[produced[-1]]]), cache=cache)
    assert produced == expected.tolist()


def test_the_random_configurations_cover_what_a_llama_can_be(random_config):
    configs = [random_config(seed) for seed in SEEDS]
    groups = [(c.num_attention_heads, c.num_key_value_heads) for c in configs]
    assert any(h > k > 1 for h, k in groups), "grouped"
    assert any(h > k == 1 for h, k in groups), "multi-query"
    assert any(h == k > 1 for h, k in groups), "multi-head"
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {getattr(c, name) for c in configs} == {True, False}, name
    assert sum(c.head_dim * c.num_attention_heads != c.hidden_size for c in configs) > 4
    scaled = [LlamaConfig.from_dict(c.to_dict()) for c in configs if c.rope_parameters["rope_type"] == "llama3"]
    on_ramp = 0
    for config in scaled:
        scaling = config.rope_scaling
        unscaled = rope_frequencies(LlamaConfig(**{**vars(config), "rope_scaling": None}), torch.device("cpu"))
        ratio = unscaled / rope_frequencies(config, torch.device("cpu"))
        assert ratio.min() >= 1 - 1e-6
        assert ratio.max() <= scaling.factor * (1 + 1e-6)
        on_ramp += int(((ratio > 1.01) & (ratio < scaling.factor - 0.01)).any())
    assert on_ramp >= 4


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_both_forms_of_rope_settings_are_one_model(rope_type, random_model, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 3000.0}
    if rope_type == "llama3":
        rope |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    reference = random_model(3, rope_parameters=rope, head_dim=16)
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written  # transformers 5's own form
    tokens = torch.arange(60)[None]
    expected = reference(tokens).logits
    assert (Llama.from_pretrained(tmp_path)(tokens) - expected).abs().max() < TOLERANCE

    official = copy.deepcopy(written)
    settings = official.pop("rope_parameters")
    official["rope_theta"] = settings.pop("rope_theta")
    official["rope_scaling"] = settings if rope_type == "llama3" else None
    (tmp_path / "config.json").write_text(json.dumps(official))
    assert (Llama.from_pretrained(tmp_path)(tokens) - expected).abs().max() < TOLERANCE
    # transformers reads the official form too.
    assert (LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits - expected).abs().max() < TOLERANCE


RELEASED = {  # the published config.json of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B
    1_235_814_400: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                    "head_dim": 64, "tie_word_embeddings": True},
    3_212_749_824: {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                    "head_dim": 128, "tie_word_embeddings": True},
    8_030_261_248: {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                    "tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("count", RELEASED)
def test_released_models_have_their_published_parameter_counts(count):
    config = LlamaConfig.from_dict(
        {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, **RELEASED[count]}
    )
    with torch.device("meta"):
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@torch.no_grad()
def test_bf16_files_load_as_bf16_or_as_asked(random_model, tmp_path):
    reference = random_model(11).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    tokens = torch.arange(40)[None]
    own = Llama.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in own.parameters()} == {torch.bfloat16}
    wide = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name).float()), name
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    assert (wide(tokens) - exact).abs().max() < TOLERANCE
    # bf16 has 8 bits: some hundredths of the logits' spread.
    assert (own(tokens).float() - exact).abs().max() < 0.1 * exact.std() + 0.1


@torch.no_grad()
def test_a_checkpoint_of_mixed_types_is_loaded_in_the_embeddings_type(random_model, tmp_path):
    from safetensors.torch import load_file, save_file

    random_model(4).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Llama.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(10)[None]).dtype == torch.bfloat16


@torch.no_grad()
def test_float64_moves_float32_logits_only_by_rounding(random_model, tmp_path):
    random_model(5).save_pretrained(tmp_path)
    tokens = torch.arange(60)[None]
    single = Llama.from_pretrained(tmp_path)(tokens)
    double = Llama.from_pretrained(tmp_path, dtype=torch.float64)(tokens)
    assert double.dtype == torch.float64
    assert (single - double).abs().max() < TOLERANCE
