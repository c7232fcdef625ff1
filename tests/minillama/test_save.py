"""A saved folder is a transformers folder, and it appears atomically."""

import json
import os

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from minillama import InputError, Llama
from minillama.files import atomic_folder

TOLERANCE = 5e-5
TOKENS = torch.arange(60)[None]


@pytest.fixture
def model(random_model, tmp_path):
    random_model(2).save_pretrained(tmp_path / "source")
    return Llama.from_pretrained(tmp_path / "source")


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_transformers_loads_what_we_save_with_equal_logits(seed, random_model, tmp_path):
    fixed = {"tie_word_embeddings": bool(seed & 1), "attention_bias": bool(seed & 2), "mlp_bias": bool(seed & 4)}
    random_model(seed, **fixed).save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(tmp_path / "theirs")
    # As after training: other weights than those of any file.
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "ours")
    reference, report = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(TOKENS)
    assert (reference(TOKENS).logits - logits).abs().max() < TOLERANCE
    assert torch.equal(Llama.from_pretrained(tmp_path / "ours")(TOKENS), logits)
    assert reference.config.tie_word_embeddings is fixed["tie_word_embeddings"]
    if seed in (0, 7):
        model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
        assert Llama.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
        assert LlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
        written = json.loads((tmp_path / "half" / "config.json").read_text())
        assert written["dtype"] == written["torch_dtype"] == "bfloat16"
        fresh, again, other = (Llama(model.config).init_weights(seed)(TOKENS) for seed in (1, 1, 2))
        assert torch.equal(fresh, again)
        assert not torch.equal(fresh, other)


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "union"),
    [(2, [2, 5, 7], (2, 5, 7)), ([7, 2], 5, (7, 2, 5)), (None, 5, (5,)), (3, None, (3,))],
)
def test_stop_tokens_are_the_union_and_survive_saving(config_eos, generation_eos, union, random_model, tmp_path):
    random_model(3, eos_token_id=config_eos).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    model = Llama.from_pretrained(tmp_path / "a")
    assert model.stop_tokens == union
    model.save_pretrained(tmp_path / "b")
    assert Llama.from_pretrained(tmp_path / "b").stop_tokens == union
    eos = GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id
    assert ((eos,) if isinstance(eos, int) else tuple(eos)) == union


def test_an_exception_in_the_middle_leaves_the_old_folder_and_no_litter(model, tmp_path, monkeypatch):
    target = tmp_path / "out"
    model.save_pretrained(target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(state, folder):
        (tmp_path / "seen").write_text(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    for folder in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            Llama(model.config).init_weights().save_pretrained(folder)
    assert (tmp_path / "seen").read_text() not in (str(target), "")  # it was being written elsewhere
    monkeypatch.undo()
    rename = os.rename

    def fail_at_last(source, destination):
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        Llama(model.config).init_weights().save_pretrained(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["out", "seen", "source"]


@torch.no_grad()
def test_files_beside_stay_and_stale_shards_do_not(random_model, model, tmp_path):
    target = tmp_path / "out"
    random_model(9).save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    (target / "tokenizer.json").write_text("{}")
    (target / "notes").mkdir()
    (target / "notes" / "card.md").write_text("kept")
    model.save_pretrained(target)
    assert [file.name for file in target.glob("model*")] == ["model.safetensors"]
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "notes" / "card.md").read_text() == "kept"
    expected = model(TOKENS)
    Llama.from_pretrained(target).save_pretrained(target)  # over its own files
    assert torch.equal(Llama.from_pretrained(target)(TOKENS), expected)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_parent_is_made_a_link_followed_and_a_file_in_the_way_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "deep" / "er" / "out")
    (tmp_path / "link").symlink_to("deep/er/out")
    fresh = Llama(model.config).init_weights(5)
    fresh.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(Llama.from_pretrained(tmp_path / "deep" / "er" / "out").output_weight, fresh.output_weight)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file: is a file; the output must be a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot be written"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_is_not_seen_under_its_name_before_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert temporary.parent == tmp_path  # the same file system: the rename is one step
    assert (tmp_path / "out" / "a").read_text() == "1"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
