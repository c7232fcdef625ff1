"""Meta's own folders (`params.json`, `consolidated.*.pth`) hold the same models as Hugging Face's.

The way back is written out here from the two layouts' definitions: Meta pairs channels (2c, 2c+1), Hugging Face
(c, c + C/2), so row 2c + j of a Meta head is row c + j*C/2 of a Hugging Face head.
"""

import json

import pytest
import torch
from meta_names import meta_name

from minillama import InputError, Llama, LlamaConfig

TOLERANCE = 5e-5
WIDTH, HEADS, KV_HEADS, MULTIPLE = 48, 6, 2, 16


def to_meta_rows(weight, head_dim):
    rows = []
    for head in range(weight.shape[0] // head_dim):
        for channel in range(head_dim):
            pair, second = divmod(channel, 2)
            rows.append(weight.detach()[head * head_dim + pair + second * (head_dim // 2)])
    return torch.stack(rows)


def write_meta(model, folder, shards=1, write_output=True, **params):
    """Meta's folder of a transformers model; model-parallel files as fairscale splits them."""
    config, head_dim = model.config, model.config.head_dim
    whole = {}
    for name, parameter in model.named_parameters():
        permuted = name.endswith(("q_proj.weight", "k_proj.weight"))
        whole[meta_name(name)] = to_meta_rows(parameter, head_dim) if permuted else parameter.detach()
    if write_output:
        whole["output.weight"] = model.lm_head.weight.detach()
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        part = {}
        for name, tensor in whole.items():
            if tensor.dim() == 2:
                by_inputs = name.endswith(("wo.weight", "w2.weight"))
                tensor = tensor.chunk(shards, dim=1 if by_inputs else 0)[shard]
            part[name] = tensor.clone()
        part["rope.freqs"] = torch.ones(head_dim // 2)
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    written = {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": -1}
    written |= {"multiple_of": MULTIPLE, "norm_eps": 1e-5, "rope_theta": config.rope_parameters["rope_theta"]}
    (folder / "params.json").write_text(json.dumps(written | params))


@pytest.fixture
def make_model(random_model):
    def make(seed, tied=False, scaled=False):
        rope = {"rope_theta": 500000.0, "rope_type": "default"}
        if scaled:  # what Meta's code has built in for the release: 32 for the tied models, else 8
            rope |= {"rope_type": "llama3", "factor": 32.0 if tied else 8.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return random_model(
            seed,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=WIDTH // HEADS,
            intermediate_size=128,  # 2/3 of 4 x 48, rounded up to a multiple of 16
            num_hidden_layers=2,
            vocab_size=128,
            rms_norm_eps=1e-5,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=tied,
            rope_parameters=rope,
        )

    return make


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_meta_folder_gives_transformers_logits(shards, tied, scaled, make_model, tmp_path):
    reference = make_model(shards, tied, scaled)
    write_meta(reference, tmp_path, shards, use_scaled_rope=scaled)
    model = Llama.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings is tied  # the second copy of a tied embedding is recognised
    # Positions so far out that the scaled wavelengths differ from the plain ones.
    tokens = torch.randint(128, (1, 700), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert (logits - reference(tokens).logits).abs().max() < TOLERANCE
    if tied:  # the output layer may be left out
        write_meta(reference, tmp_path, shards, write_output=False, use_scaled_rope=scaled)
        assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), logits)
    write_meta(reference, tmp_path, shards, use_scaled_rope=not scaled)
    assert (Llama.from_pretrained(tmp_path)(tokens) - logits).abs().max() > 20 * TOLERANCE


@torch.no_grad()
def test_a_meta_folder_saved_by_us_loads_in_transformers(make_model, tmp_path):
    from transformers import LlamaForCausalLM

    reference = make_model(6, tied=True, scaled=True).to(torch.bfloat16)
    write_meta(reference, tmp_path / "meta", shards=2, use_scaled_rope=True)
    model = Llama.from_pretrained(tmp_path / "meta")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "hf")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert dict(read.state_dict()).keys() == dict(reference.state_dict()).keys()
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in read.state_dict().items())


PUBLISHED = [  # Meta's params.json, and what Hugging Face's config.json of the same checkpoint says
    (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
         "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        False, 14336, 8.0, 8_030_261_248,
    ),
    (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
         "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        True, 8192, 32.0, 1_235_814_400,
    ),
    (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
         "ffn_dim_multiplier": 1.0, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        True, 8192, 32.0, 3_212_749_824,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("params", "tied", "inner", "factor", "count"), PUBLISHED)
def test_published_params_json_give_the_published_shape(params, tied, inner, factor, count):
    config = LlamaConfig.from_meta(params, 128256, tied)
    assert config.intermediate_size == inner
    assert config.rope_scaling.factor == factor
    assert config.rope_scaling.original_max_position_embeddings == 8192
    assert config.bos_token_id == 128000
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Llama(config).parameters()) == count


class Attack:
    def __reduce__(self):
        return (print, ("code from a checkpoint has run",))


def _truncate(folder):
    file = folder / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def _rewrite(folder, change):
    file = folder / "consolidated.00.pth"
    torch.save(change(torch.load(file)), file)


DAMAGES = {
    "a missing shard": (
        lambda f: (f / "consolidated.01.pth").unlink(),
        r"layers\.1\.self_attn\.o_proj\.weight \[48, 24\] instead of \[48, 48\]",
    ),
    "code": (
        lambda f: _rewrite(f, lambda t: {**t, "extra": Attack()}),
        r"consolidated\.00\.pth: truncated, damaged or not a file of weights",
    ),
    "truncated": (_truncate, r"consolidated\.00\.pth: truncated, damaged"),
    "no pth": (lambda f: (f / "consolidated.00.pth").unlink(), r"params\.json without consolidated"),
    "no dim": (lambda f: (f / "params.json").write_text('{"n_heads": 4}'), r"params\.json: dim is None"),
    "no JSON": (lambda f: (f / "params.json").write_text("{"), r"params\.json: not valid JSON"),
    "a list": (lambda f: _rewrite(f, list), r"consolidated\.00\.pth: .*expected a table of tensors"),
    "int8": (
        lambda f: _rewrite(f, lambda t: {**t, "output.weight": t["output.weight"].to(torch.int8)}),
        r"quantised weights cannot be run.*output\.weight \(torch\.int8\)",
    ),
    "unknown and missing": (
        lambda f: _rewrite(f, lambda t: {("stray.weight" if k == "norm.weight" else k): v for k, v in t.items()}),
        r"missing: model\.norm\.weight; unexpected: stray\.weight",
    ),
    "no embedding": (
        lambda f: _rewrite(f, lambda t: {k: v for k, v in t.items() if k != "tok_embeddings.weight"}),
        r"no tok_embeddings\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_meta_folder_is_refused_in_one_line_and_no_code_is_run(damage, make_model, tmp_path, capfd):
    write_meta(make_model(8), tmp_path, shards=2 if damage == "a missing shard" else 1)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Llama.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "has run" not in capfd.readouterr().out
