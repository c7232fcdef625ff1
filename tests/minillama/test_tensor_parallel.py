"""The shards of a model are the model; what they compute together is tested in tests/decode."""

import pytest
import torch
from tiny import tiny_model

from minillama import InputError
from minillama.tensor_parallel import LlamaShard, TPGroup, check_divides

FIELDS = {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}


@pytest.mark.parametrize("vocabulary", [400, 401])
@pytest.mark.parametrize("size", [2, 4])
def test_concatenated_shards_are_the_model(size, vocabulary):
    whole = tiny_model(1, vocab_size=vocabulary, **FIELDS)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    models = [LlamaShard(whole.config, TPGroup(rank, size)) for rank in range(size)]
    for name, tensor in whole.state_dict().items():
        shards = [TPGroup(rank, size).shard(name, tensor) for rank in range(size)]
        shapes = {tuple(model.state_dict()[name].shape) for model in models}
        assert {tuple(shard.shape) for shard in shards} == shapes
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(sum(shards), tensor)
        elif name.endswith("norm.weight"):
            assert all(torch.equal(shard, tensor) for shard in shards)
        else:
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            together = torch.cat(shards, dim=axis)
            assert torch.equal(together[: len(tensor)], tensor)
            assert not together[len(tensor) :].any()


def test_what_cannot_be_shared_evenly_is_refused_with_what_can():
    config = tiny_model(0, num_attention_heads=8, num_key_value_heads=4, intermediate_size=48).config
    check_divides(config, 1)
    check_divides(config, 4)
    with pytest.raises(InputError, match=r"L has 8 attention heads, which 3 processes .* it can be split in 2, 4"):
        check_divides(config, 3, "L")
    with pytest.raises(InputError, match="4 key and value heads, which 8 processes cannot share evenly"):
        TPGroup(0, 8).shard_config(config)
    with pytest.raises(InputError, match=r"1 key and value heads.* it cannot be split"):
        check_divides(tiny_model(0, num_key_value_heads=1).config, 2)
    with pytest.raises(InputError, match="49 inner channels"):
        check_divides(tiny_model(0, intermediate_size=49).config, 2)
