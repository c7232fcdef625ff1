"""A model whose layers are Triton kernels, here in the interpreter, computes what the model computes."""

import os

import pytest
import torch
from tiny import tiny_model

if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from decode.model.cuda_layer import CudaLayer
from decode.model.batch import DecodeBatch, DecodeTables, ForwardBatch, Segment
from decode.model.packed_llama import PackedLlama

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if WHERE == "cuda" else []
SHAPES = {
    "grouped": {},
    "odd head": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied, many groups": {"tie_word_embeddings": False, "num_attention_heads": 6, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.inference_mode()
def test_its_logits_are_the_models_own(monkeypatch, shape, dtype, within):
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    model = tiny_model(7, **SHAPES[shape])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    model = model.to(WHERE, dtype)
    packed = PackedLlama(model, "plain", invariant=False)
    assert all(isinstance(layer, CudaLayer) for layer in packed.layers)
    tokens = torch.randint(400, (2, 13), generator=generator).to(WHERE)
    expected_BTV = model.float()(tokens)
    cache = packed.cache(3, 13)
    found = []
    for first, last in ((0, 8), (8, 9), (9, 13)):  # a prompt, a step, several tokens
        positions = ForwardBatch(packed.config, [Segment(0, 2, last - first)], [first, first], cache)
        hidden_RD = packed.hidden(tokens[:, first:last].flatten(), positions, cache)
        found.append(packed.logits(hidden_RD).float().view(2, last - first, -1))
    found_BTV = torch.cat(found, dim=1)
    assert (found_BTV - expected_BTV).abs().max() < within * expected_BTV.abs().max()
    assert not cache.entries_LBSEKC[:, 2].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("rows", "invariant"), [(1, False), (3, False), (3, True)])
@torch.inference_mode()
def test_steps_of_a_graph_have_the_models_own_logits(monkeypatch, shape, dtype, within, rows, invariant):
    """Slots of unequal lengths, one new position each; one slot alone takes other kernels than several."""
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    model = tiny_model(7, **SHAPES[shape])
    generator = torch.Generator().manual_seed(rows)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    model = model.to(WHERE, dtype)
    packed = PackedLlama(model, "plain", invariant=invariant)
    lengths = [70, 3, 17][:rows]
    texts = [torch.randint(400, (length + 3,), generator=generator).to(WHERE) for length in lengths]
    expected = [model.float()(text[None])[0] for text in texts]
    cache = packed.cache(rows, 80)
    segments = [Segment(row, 1, length) for row, length in enumerate(lengths)]
    prompts_R = torch.cat([text[:length] for text, length in zip(texts, lengths)])
    packed.hidden(prompts_R, ForwardBatch(packed.config, segments, [0] * rows, cache), cache)
    tables = DecodeTables(packed.config, cache)
    for step in range(3):
        token_B = torch.stack([text[length + step] for text, length in zip(texts, lengths)])
        position_B = torch.tensor([length + step for length in lengths], device=WHERE)
        positions = DecodeBatch(tables, position_B, cache.capacity)
        found_BV = packed.logits(packed.hidden(token_B, positions, cache)).float()
        expected_BV = torch.stack([logits_TV[length + step] for logits_TV, length in zip(expected, lengths)])
        assert (found_BV - expected_BV).abs().max() < within * expected_BV.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_invariant_bits_do_not_depend_on_how_a_text_was_read(monkeypatch, dtype):
    """A prompt at once beside others, in chunks, and position by position as a graph reads it."""
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    packed = PackedLlama(tiny_model(7).to(WHERE, dtype), "plain", invariant=True)
    generator = torch.Generator().manual_seed(0)
    text, other = (torch.randint(400, (length,), generator=generator).to(WHERE) for length in (21, 30))
    cache = packed.cache(2, 40)

    def read(tokens, segments, starts):
        return packed.hidden(tokens, ForwardBatch(packed.config, segments, starts, cache), cache)

    together = read(torch.cat((text, other)), [Segment(0, 1, 21), Segment(1, 1, 30)], [0, 0])[:21]
    parts = [read(text[:13], [Segment(0, 1, 13)], [0]), read(text[13:], [Segment(0, 1, 8)], [13])]
    assert torch.equal(together, torch.cat(parts))
    tables = DecodeTables(packed.config, cache)
    for at in range(21):
        position_B = torch.tensor([at, 0], device=WHERE)
        one = packed.hidden(text[at].expand(2), DecodeBatch(tables, position_B, cache.capacity), cache)[0]
        assert torch.equal(one, together[at])
