"""A packed model computes what the model computes, and a position's bits do not depend on its batch."""

import pytest
import torch
from tiny import WEIGHT_DTYPES, tiny_model, with_noise

from decode.model.batch import KEYS_MULTIPLE, ForwardBatch, Segment
from decode.model.layer import joined_halves
from decode.model.packed_llama import PackedLlama
from minillama import Llama
from minillama.config import RopeScaling

MLP = "model.layers.0.mlp"
SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "odd head": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "llama3": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
    "wide": {"hidden_size": 96, "intermediate_size": 1536, "num_attention_heads": 6, "head_dim": 16},
}


@pytest.fixture(params=SHAPES, scope="module")
def model(request):
    return with_noise(tiny_model(7, max_position_embeddings=200, **SHAPES[request.param]))


def random_tokens(model, *counts):
    generator = torch.Generator().manual_seed(sum(counts))
    return [torch.randint(model.config.vocab_size, (count,), generator=generator) for count in counts]


def read(packed, cache, segments, starts, tokens):
    hidden_RD = packed.hidden(torch.cat(tokens), ForwardBatch(packed.config, segments, starts, cache), cache)
    return packed.logits(hidden_RD)


def one_at_a_time(packed, tokens):
    cache = packed.cache(1, len(tokens))
    passes = [read(packed, cache, [Segment(0, 1, 1)], [at], [tokens[at : at + 1]]) for at in range(len(tokens))]
    return torch.cat(passes)


@torch.inference_mode()
def ragged(packed, a, b, c, d):
    """Logits of four texts of 30, 41, 17 and 40 tokens, in three forward passes with every kind of segment."""
    cache = packed.cache(4, 41)
    first = read(
        packed, cache, [Segment(0, 1, 10), Segment(2, 1, 7), Segment(3, 1, 1)], [0, 0, 0], [a[:10], c[:7], d[:1]]
    )
    further = [a[10:20], b[:10], c[7:17], d[1:11]]
    second = read(packed, cache, [Segment(0, 4, 10)], [10, 0, 7, 1], further)
    third = read(
        packed, cache, [Segment(0, 1, 10), Segment(1, 1, 31), Segment(3, 1, 29)], [20, 10, 11], [a[20:], b[10:], d[11:]]
    )
    return (
        torch.cat((first[:10], second[:10], third[:10])),
        torch.cat((second[10:20], third[10:41])),
        torch.cat((first[10:17], second[20:30])),
        torch.cat((first[17:], second[30:], third[41:])),
    )


@pytest.mark.parametrize(
    ("weight_dtype", "within"), [("float32", 1e-5), ("plain", 1e-5), ("bfloat16", 0.3), ("int8", 0.3)]
)
@torch.inference_mode()
def test_ragged_batches_give_the_models_own_logits(model, weight_dtype, within):
    packed = PackedLlama(model, weight_dtype)
    texts = random_tokens(model, 30, 41, 17, 40)
    for text, logits_TV in zip(texts, ragged(packed, *texts)):
        expected_TV = model(text[None])[0]
        assert expected_TV.std() > 0.5
        assert (logits_TV - expected_TV).abs().max() < within * expected_TV.abs().max()


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@torch.inference_mode()
def test_a_positions_bits_do_not_depend_on_its_batch(model, weight_dtype):
    packed = PackedLlama(model, weight_dtype)
    texts = random_tokens(model, 30, 41, 17, 40)
    for text, logits_TV in zip(texts, ragged(packed, *texts)):
        assert torch.equal(one_at_a_time(packed, text), logits_TV)


@torch.inference_mode()
def test_the_keys_that_are_read_are_padded_across_their_multiple(model):
    packed = PackedLlama(model)
    (text,) = random_tokens(model, 2 * KEYS_MULTIPLE + 3)
    cache = packed.cache(2, len(text))
    assert cache.capacity == 3 * KEYS_MULTIPLE
    cache.entries_LBSEKC.fill_(1e30)  # what lies after the end of a slot is finite, and never read
    whole = read(packed, cache, [Segment(1, 1, len(text))], [0], [text])
    assert torch.equal(one_at_a_time(packed, text), whole)
    assert (whole - model(text[None])[0]).abs().max() < 2e-4


@torch.inference_mode()
def test_a_consumed_model_is_empty_and_its_successor_the_same():
    model, same = tiny_model(3, tie_word_embeddings=False), tiny_model(3, tie_word_embeddings=False)
    packed, consumed = PackedLlama(same), PackedLlama(model, consume=True)
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(p.numel() for p in same.parameters())
    (text,) = random_tokens(same, 9)
    assert torch.equal(one_at_a_time(packed, text), one_at_a_time(consumed, text))


def test_running_past_the_end_of_the_cache_is_an_error():
    packed = PackedLlama(tiny_model(0))
    cache = packed.cache(2, 10)
    with pytest.raises(ValueError, match="position 64 runs past the end of a cache of 64 positions"):
        ForwardBatch(packed.config, [Segment(0, 2, 5)], [3, 60], cache)


def test_weights_that_are_joined_are_held_once_and_saved_twice(tmp_path):
    """As on a GPU, where a model continues with views of the joined tensor."""
    model = tiny_model(3)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    mlp = model.model.layers[0].mlp
    joined = joined_halves(mlp.gate_proj.weight, mlp.up_proj.weight)
    assert torch.equal(joined, torch.cat((expected[f"{MLP}.gate_proj.weight"], expected[f"{MLP}.up_proj.weight"])))
    assert mlp.up_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    again = joined_halves(mlp.gate_proj.weight, mlp.up_proj.weight)
    assert again.data_ptr() == joined.data_ptr()
    model.save_pretrained(tmp_path / "saved")
    for name, weight in Llama.from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(weight, expected[name])
