"""A model cut to its first layers is what transformers computes with those layers, in a whole model's folder."""

import json

import pytest
import torch
from tiny import tiny_model

from corpora import Prompt
from minillama import InputError, Llama, Tokenizer
from minillama.files import atomic_folder
from train.first_layers import first_layers, main


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_cut_model_is_transformers_own_with_fewer_layers(tmp_path, tokenizer_folder, tied):
    from transformers import LlamaForCausalLM

    model = tiny_model(1, num_hidden_layers=4, tie_word_embeddings=tied, eos_token_id=(1, 5))
    with atomic_folder(tmp_path / "whole") as folder:
        model.write_files(folder)
        Tokenizer.from_pretrained(tokenizer_folder).save(folder)
        Prompt.load("plain").save(folder)
    assert main(["--model", str(tmp_path / "whole"), "--layers", "3", "--output", str(tmp_path / "cut")]) == 0

    reference = LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()
    reference.model.layers = reference.model.layers[:3]
    tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(2))
    expected = reference(tokens, use_cache=False).logits
    ours = Llama.from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "cut").eval()
    torch.testing.assert_close(theirs(tokens).logits, expected)

    assert ours.stop_tokens == (1, 5)
    for name in ("generation_config.json", "tokenizer.json", "prompt.toml"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.parametrize("count", [0, 3])
def test_a_count_that_the_model_does_not_have_is_refused(count):
    with pytest.raises(InputError, match=f"--layers {count}: the model has 2, expected 1 to 2"):
        first_layers(tiny_model(0), count)
