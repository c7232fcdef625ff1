"""A model whose layers run as they do on a GPU, here through Triton's interpreter, is the model."""

import os

import pytest
import torch
from tiny import tiny_model

if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from decode.model.cuda_layer import GpuLayer
from decode.model.batch import Pass, RowsPass, RowsPlaces, Span
from decode.model.packed_llama import PreparedLlama

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
    prepared = PreparedLlama(model, "plain", invariant=False)
    assert all(isinstance(layer, GpuLayer) for layer in prepared.layers)
    tokens = torch.randint(400, (2, 13), generator=generator).to(WHERE)
    expected_BTV = model.float()(tokens)
    cache = prepared.cache(3, 13)
    found = []
    for first, last in ((0, 8), (8, 9), (9, 13)):  # a prompt, a step, several tokens
        positions = Pass(prepared.config, [Span(0, 2, last - first)], [first, first], cache)
        hidden_RD = prepared.hidden(tokens[:, first:last].flatten(), positions, cache)
        found.append(prepared.logits(hidden_RD).float().view(2, last - first, -1))
    found_BTV = torch.cat(found, dim=1)
    assert (found_BTV - expected_BTV).abs().max() < within * expected_BTV.abs().max()
    assert not cache.entries_LBSEKC[:, 2].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("rows", "invariant"), [(1, False), (3, False), (3, True)])
@torch.inference_mode()
def test_steps_of_a_graph_have_the_models_own_logits(monkeypatch, shape, dtype, within, rows, invariant):
    """Rows of unequal lengths, one new position each; a row alone takes other kernels than several."""
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    model = tiny_model(7, **SHAPES[shape])
    generator = torch.Generator().manual_seed(rows)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    model = model.to(WHERE, dtype)
    prepared = PreparedLlama(model, "plain", invariant=invariant)
    lengths = [70, 3, 17][:rows]
    texts = [torch.randint(400, (length + 3,), generator=generator).to(WHERE) for length in lengths]
    expected = [model.float()(text[None])[0] for text in texts]
    cache = prepared.cache(rows, 80)
    spans = [Span(row, 1, length) for row, length in enumerate(lengths)]
    prompts_R = torch.cat([text[:length] for text, length in zip(texts, lengths)])
    prepared.hidden(prompts_R, Pass(prepared.config, spans, [0] * rows, cache), cache)
    places = RowsPlaces(prepared.config, cache)
    for step in range(3):
        token_B = torch.stack([text[length + step] for text, length in zip(texts, lengths)])
        position_B = torch.tensor([length + step for length in lengths], device=WHERE)
        positions = RowsPass(places, position_B, cache.capacity)
        found_BV = prepared.logits(prepared.hidden(token_B, positions, cache)).float()
        expected_BV = torch.stack([logits_TV[length + step] for logits_TV, length in zip(expected, lengths)])
        assert (found_BV - expected_BV).abs().max() < within * expected_BV.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_invariant_bits_do_not_depend_on_how_a_text_was_read(monkeypatch, dtype):
    """A prompt at once beside others, in parts, and position by position as a graph reads it."""
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    prepared = PreparedLlama(tiny_model(7).to(WHERE, dtype), "plain", invariant=True)
    generator = torch.Generator().manual_seed(0)
    text, other = (torch.randint(400, (length,), generator=generator).to(WHERE) for length in (21, 30))
    cache = prepared.cache(2, 40)

    def read(tokens, spans, starts):
        return prepared.hidden(tokens, Pass(prepared.config, spans, starts, cache), cache)

    together = read(torch.cat((text, other)), [Span(0, 1, 21), Span(1, 1, 30)], [0, 0])[:21]
    parts = [read(text[:13], [Span(0, 1, 13)], [0]), read(text[13:], [Span(0, 1, 8)], [13])]
    assert torch.equal(together, torch.cat(parts))
    places = RowsPlaces(prepared.config, cache)
    for at in range(21):
        position_B = torch.tensor([at, 0], device=WHERE)
        one = prepared.hidden(text[at].expand(2), RowsPass(places, position_B, cache.capacity), cache)[0]
        assert torch.equal(one, together[at])
