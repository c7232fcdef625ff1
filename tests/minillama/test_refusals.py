"""A model that cannot be run is refused by name, in one line, before a weight is read."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillama import InputError, Llama, LlamaConfig, Tokenizer
from minillama.weights import open_folder

SMALL = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}

REFUSED = [  # change of config.json, what the error must name
    ({"model_type": "mistral"}, r"model_type is 'mistral'; only 'llama'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope type is 'linear'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r"rope type is 'longrope'"),
    ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
    ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}, r"llama3 .*high_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, r"high_freq_factor > low_freq_factor"),
    ({"rope_scaling": "llama3"}, r"RoPE settings are 'llama3'"),
    ({"sliding_window": 4096}, r"sliding-window attention"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, r"sliding-window attention"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
    ({"hidden_size": None, "vocab_size": None}, r"no vocab_size, hidden_size"),
    ({"num_attention_heads": "4"}, r"num_attention_heads is '4'"),
    ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 5}, r"head_dim 5 is odd"),
    ({"vocab_size": -1}, r"vocab_size is -1"),
    ({"num_hidden_layers": 1.5}, r"num_hidden_layers is 1\.5"),
]


@pytest.fixture
def folder(random_model, tmp_path):
    path = tmp_path / "model"
    random_model(0, tie_word_embeddings=False, attention_bias=False, mlp_bias=False).save_pretrained(path)
    return path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, match):
    with pytest.raises(InputError, match=match) as caught:
        Llama.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_configuration_that_cannot_be_run_is_named_before_a_weight_is_looked_for(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))  # there is no weight file at all
    assert str(tmp_path / "config.json") in refused(tmp_path, message)


@given(rope=st.sampled_from([None, LLAMA3]), tied=st.booleans(), biases=st.tuples(st.booleans(), st.booleans()),
       theta=st.floats(1, 1e7), eos=st.lists(st.integers(0, 63), max_size=3))  # fmt: skip
def test_a_configuration_written_and_read_again_is_the_same(rope, tied, biases, theta, eos):
    config = LlamaConfig.from_dict(
        SMALL
        | {"rope_scaling": rope, "rope_theta": theta, "tie_word_embeddings": tied, "eos_token_id": eos or None}
        | {"attention_bias": biases[0], "mlp_bias": biases[1]}
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert LlamaConfig.from_dict(written) == config
    # Either form of the RoPE settings is complete.
    official = {name: value for name, value in written.items() if name != "rope_parameters"}
    assert LlamaConfig.from_dict(official) == config
    newer = {name: value for name, value in written.items() if name not in ("rope_scaling", "rope_theta")}
    assert LlamaConfig.from_dict(newer | {"sliding_window": None, "quantization_config": None}) == config
    assert (config.head_dim, config.rope_theta, config.rope_scaling is None) == (4, theta, rope is None)


def test_every_missing_unexpected_and_misshapen_tensor_is_in_one_error(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
        tensors["visual.weight"] = torch.zeros(2, 2)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].clone()

    rows, width = load_file(folder / "model.safetensors")["lm_head.weight"].shape
    change_tensors(folder, change)
    message = refused(folder, "the tensors do not fit the configuration")
    for part in (
        "missing: model.layers.0.self_attn.q_proj.weight, model.norm.weight;",
        "unexpected: model.layers.0.self_attn.q_proj.bias, visual.weight;",
        f"lm_head.weight [{rows}, {width - 1}] instead of [{rows}, {width}], "
        f"model.embed_tokens.weight [{rows - 1}, {width}] instead of [{rows}, {width}]",
    ):
        assert part in message


def test_quantised_tensors_without_a_word_in_the_config_are_listed(folder):
    names = {"lm_head.weight": torch.int8, "model.layers.0.mlp.up_proj.weight": torch.float8_e4m3fn}
    change_tensors(folder, lambda t: t.update({name: t[name].to(dtype) for name, dtype in names.items()}))
    message = refused(folder, "quantised weights cannot be run")
    assert "lm_head.weight (I8)" in message
    assert "model.layers.0.mlp.up_proj.weight (F8_E4M3)" in message


def test_tables_that_any_program_computes_and_a_tied_output_written_out_are_no_fault(random_model, tmp_path):
    random_model(0, tie_word_embeddings=True).save_pretrained(tmp_path)
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    change_tensors(tmp_path, lambda t: t.update(tables, **{"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = Llama.from_pretrained(tmp_path)
    assert model.output_weight is model.model.embed_tokens.weight
    change_tensors(tmp_path, lambda t: t.pop("lm_head.weight"))
    change_config(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, r"missing: lm_head\.weight$")


@pytest.mark.parametrize("keep", [0, 5, 500, -1, 0.5])
def test_a_truncated_safetensors_file_is_refused_with_its_name(keep, folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(folder, r"model\.safetensors: truncated or damaged \([\d,]+ bytes")


def test_shards_load_and_a_missing_or_truncated_one_is_named(random_model, tmp_path):
    reference = random_model(1)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert (Llama.from_pretrained(tmp_path)(tokens) - reference(tokens).logits).abs().max() < 5e-5
    data = (tmp_path / shards[2]).read_bytes()
    (tmp_path / shards[2]).write_bytes(data[:-7])
    refused(tmp_path, rf"{shards[2]}: truncated or damaged")
    (tmp_path / shards[1]).unlink()
    (tmp_path / shards[2]).unlink()
    refused(tmp_path, rf"shards that are not there: {shards[1]}, {shards[2]}$")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, r"index\.json: no weight_map")


def test_a_refused_checkpoint_has_had_no_weight_read(folder, monkeypatch):
    change_config(folder, mlp_bias=True)
    monkeypatch.setattr("minillama.weights._read_largest_first", lambda *_: pytest.fail("a weight was read"))
    assert refused(folder, "missing: ").count("mlp.") == 3 * open_folder(folder).config.num_hidden_layers


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "a--b/c", "../nowhere", "~/nowhere", "owner/name"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (Llama.from_pretrained, Tokenizer.from_pretrained):
        with pytest.raises(InputError, match=r"no such folder") as caught:
            load(name)
        assert str(caught.value).startswith(name)
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_a_file_and_a_broken_config_are_named(tmp_path):
    refused(tmp_path, r"not a model: there is neither config\.json")
    with pytest.raises(InputError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused(file, r"model\.gguf: is a file; a model is a folder")
    for content, message in ((b"{", "not valid J"), (b"\xff{}", "not valid J"), (b"[]", "expected a JSON object")):
        (tmp_path / "config.json").write_bytes(content)
        refused(tmp_path, message)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    refused(tmp_path, r"no model\.safetensors and no model\.safetensors\.index\.json")
