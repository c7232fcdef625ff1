"""Our Llama computes what transformers' Llama computes, with and without a cache, for any shape of model and batch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    hidden_BTD = model.hidden(tokens_BT)
    assert (hidden_BTD - reference.model(tokens_BT).last_hidden_state).abs().max() < TOLERANCE
    assert torch.equal(hidden_BTD @ model.output_weight.T, plain_BTV)

    # Prefill in uneven chunks, then token by token.
    cache = KVCache(model.config, 3, 40)
    chunks, start = [], 0
    for count in (7, 1, 16, 11, 1, 1, 1, 1, 1):
        chunks.append(model(tokens_BT[:, start : start + count], cache=cache))
        start += count
    assert cache.lengths_B.tolist() == [40, 40, 40]
    assert (torch.cat(chunks, dim=1) - expected_BTV).abs().max() < TOLERANCE


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
        on_ramp += int(((ratio > 1.01) & (ratio < scaling.factor - 0.01)).any())
    assert on_ramp >= 4


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_both_forms_of_rope_settings_are_one_model(rope_type, random_model, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 3000.0}
    if rope_type == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 32
    reference = random_model(3, rope_parameters=rope, head_dim=16)
    reference.save_pretrained(tmp_path)
    official = json.loads((tmp_path / "config.json").read_text())  # in transformers 5's own form
    tokens = torch.arange(60)[None]
    expected = reference(tokens).logits
    assert (Llama.from_pretrained(tmp_path)(tokens) - expected).abs().max() < TOLERANCE

    settings = official.pop("rope_parameters")
    official["rope_theta"] = settings.pop("rope_theta")
    official["rope_scaling"] = settings if rope_type == "llama3" else None
    (tmp_path / "config.json").write_text(json.dumps(official))
    assert (Llama.from_pretrained(tmp_path)(tokens) - expected).abs().max() < TOLERANCE
    assert (LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_bf16_files_load_as_bf16_or_in_the_requested_type(random_model, tmp_path):
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
    double = Llama.from_pretrained(tmp_path, dtype=torch.float64)
    assert double.dtype == torch.float64
    assert (wide(tokens) - double(tokens)).abs().max() < TOLERANCE
    # bf16 has 8 bits: some hundredths of the logits' spread.
    assert (own(tokens).float() - exact).abs().max() < 0.1 * exact.std() + 0.1


@torch.no_grad()
def test_a_checkpoint_of_mixed_types_is_loaded_in_the_embeddings_type(random_model, tmp_path):
    random_model(4).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Llama.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(10)[None]).dtype == torch.bfloat16
