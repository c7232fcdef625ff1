"""A model whose layers are Triton kernels, here in the interpreter, computes what the model computes."""

import pytest
import torch
from tiny import tiny_model, with_noise

pytest.importorskip("triton")

from decode.model.batch import DecodeBatch, DecodeTables, ForwardBatch, Segment
from decode.model.cuda_layer import CudaLayer
from decode.model.packed_llama import PackedLlama

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if WHERE == "cuda" else []
SHAPES = {
    "grouped": {},
    "odd head": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied, many groups": {"tie_word_embeddings": False, "num_attention_heads": 6, "num_key_value_heads": 2},
}
FLOAT32, BFLOAT16 = (torch.float32, 1e-5), (torch.bfloat16, 0.1)  # with the largest relative error of logits


def slow(*values):
    """The interpreter runs program after program: what repeats a property is not in the plain run."""
    return pytest.param(*values, marks=pytest.mark.slow if WHERE == "cpu" else [])


@pytest.mark.parametrize(
    ("shape", "dtype", "within"),
    [*((shape, *FLOAT32) for shape in SHAPES), ("grouped", *BFLOAT16), *(slow(s, *BFLOAT16) for s in list(SHAPES)[1:])],
)
@torch.inference_mode()
def test_its_logits_are_the_models_own(monkeypatch, shape, dtype, within):
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    generator = torch.Generator().manual_seed(1)
    model = with_noise(tiny_model(7, vocab_size=80, **SHAPES[shape])).to(WHERE, dtype)
    packed = PackedLlama(model, "plain", invariant=False)
    assert all(isinstance(layer, CudaLayer) for layer in packed.layers)
    tokens = torch.randint(80, (2, 9), generator=generator).to(WHERE)
    expected_BTV = model.float()(tokens)
    cache = packed.cache(3, 9)
    found = []
    for first, last in ((0, 5), (5, 6), (6, 9)):  # a prompt, a step, several tokens
        positions = ForwardBatch(packed.config, [Segment(0, 2, last - first)], [first, first], cache)
        hidden_RD = packed.hidden(tokens[:, first:last].flatten(), positions, cache)
        found.append(packed.logits(hidden_RD).float().view(2, last - first, -1))
    found_BTV = torch.cat(found, dim=1)
    assert (found_BTV - expected_BTV).abs().max() < within * expected_BTV.abs().max()
    assert not cache.entries_LBSEKC[:, 2].any()


MODES = [(1, False), (3, False), (3, True)]
CASES = [(*mode, shape, *kind) for mode in MODES for shape in SHAPES for kind in (FLOAT32, BFLOAT16)]
PLAIN = [*((*mode, "grouped", *FLOAT32) for mode in MODES), *((*mode, "biases", *FLOAT32) for mode in MODES[:2])]
PLAIN.append((3, False, "grouped", *BFLOAT16))


@pytest.mark.parametrize(
    ("slots", "invariant", "shape", "dtype", "within"),
    [*PLAIN, *(slow(*case) for case in CASES if case not in PLAIN)],
)
@torch.inference_mode()
def test_steps_of_a_graph_have_the_models_own_logits(monkeypatch, slots, invariant, shape, dtype, within):
    """Slots of unequal lengths, one new position each; one slot alone takes other kernels than several.

    Prompts are read by the layers in PyTorch's operations, which leave the same cache.
    """
    generator = torch.Generator().manual_seed(slots)
    model = with_noise(tiny_model(7, vocab_size=80, **SHAPES[shape])).to(WHERE, dtype)
    lengths = [70, 3, 17][:slots]
    texts = [torch.randint(80, (length + 2,), generator=generator).to(WHERE) for length in lengths]
    prompts_R = torch.cat([text[:length] for text, length in zip(texts, lengths)])
    monkeypatch.setenv("COLLAB_KERNELS", "eager")
    reader = PackedLlama(model, "plain", invariant=False)
    cache = reader.cache(slots, 80)
    segments = [Segment(slot, 1, length) for slot, length in enumerate(lengths)]
    reader.hidden(prompts_R, ForwardBatch(reader.config, segments, [0] * slots, cache), cache)
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    packed = PackedLlama(model, "plain", invariant=invariant)
    assert (reader.in_triton, packed.in_triton) == (False, True)
    expected = [model.float()(text[None])[0] for text in texts]
    tables = DecodeTables(packed.config, cache)
    for step in range(2):
        token_B = torch.stack([text[length + step] for text, length in zip(texts, lengths)])
        position_B = torch.tensor([length + step for length in lengths], device=WHERE)
        positions = DecodeBatch(tables, position_B, cache.capacity)
        found_BV = packed.logits(packed.hidden(token_B, positions, cache)).float()
        expected_BV = torch.stack([logits_TV[length + step] for logits_TV, length in zip(expected, lengths)])
        assert (found_BV - expected_BV).abs().max() < within * expected_BV.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
@torch.inference_mode()
def test_invariant_bits_do_not_depend_on_how_a_text_was_read(monkeypatch, dtype):
    """A prompt at once beside others, in chunks, and position by position as a graph reads it."""
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    packed = PackedLlama(tiny_model(7, num_hidden_layers=1).to(WHERE, dtype), "plain", invariant=True)
    generator = torch.Generator().manual_seed(0)
    text, other = (torch.randint(400, (length,), generator=generator).to(WHERE) for length in (8, 11))
    cache = packed.cache(2, 20)

    def read(tokens, segments, starts):
        return packed.hidden(tokens, ForwardBatch(packed.config, segments, starts, cache), cache)

    together = read(torch.cat((text, other)), [Segment(0, 1, 8), Segment(1, 1, 11)], [0, 0])[:8]
    chunks = [read(text[:5], [Segment(0, 1, 5)], [0]), read(text[5:], [Segment(0, 1, 3)], [5])]
    assert torch.equal(together, torch.cat(chunks))
    tables = DecodeTables(packed.config, cache)
    for at in range(8):
        position_B = torch.tensor([at, 0], device=WHERE)
        one = packed.hidden(text[at].expand(2), DecodeBatch(tables, position_B, cache.capacity), cache)[0]
        assert torch.equal(one, together[at])
