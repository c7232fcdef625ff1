"""What only a GPU can show: graphs, concurrency, large shapes. The Triton half of the other files runs there too."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import assert_means_the_same

from kernels import Sampling, fused_logits
from kernels.types import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def logits_of(batch, vocabulary, members=3, dtype=torch.bfloat16):
    torch.manual_seed(batch + vocabulary)
    return [torch.randn(batch, vocabulary, device="cuda", dtype=dtype) * 3 for _ in range(members)]


@pytest.mark.parametrize("batch", [1, 8, 64, 1024])
@pytest.mark.parametrize("vocabulary", [128_256, 50_257])
def test_large_shapes(batch, vocabulary):
    logits = logits_of(batch, vocabulary)
    weights = torch.tensor([1.0, -0.5, 0.7], device="cuda")
    result = fused_logits(logits, weights, members=True, top_k=4)
    for part in torch.arange(batch).split(64):
        request = Request(tuple(l_BV[part] for l_BV in logits), weights, members=True, top_k=4)
        names = ("token", "logprob", "flag", "top_token", "top_logprob")
        rows = {name: getattr(result, name)[part] for name in names}
        assert_means_the_same(request, replace(result, **rows, member_logprob=result.member_logprob[:, part]))


def test_a_thousand_launches_give_the_same_bits():
    logits, weights = logits_of(16, 128_256), torch.tensor([1.0, 0.5, 0.25], device="cuda")
    first = fused_logits(logits, weights, top_k=32)
    token, bits = first.token.clone(), first.logprob.view(torch.int32).clone()
    for _ in range(1000):
        again = fused_logits(logits, weights, top_k=32, out=first)
        assert torch.equal(again.token, token)
        assert torch.equal(again.logprob.view(torch.int32), bits)


@pytest.mark.parametrize("truncated", [False, True])
def test_a_captured_step_follows_its_inputs(truncated):
    """Weights, some of them zero, and all sampling parameters change between replays of one graph."""
    logits, weights = logits_of(8, 128_256), torch.ones(3, 8, device="cuda")
    rows, position = torch.arange(8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    temperature, seed = torch.full((8,), 0.8, device="cuda"), torch.full((8,), 3, device="cuda")
    top_k, top_p = torch.full((8,), 50, device="cuda"), torch.full((8,), 0.9, device="cuda")
    sample = Sampling(seed, rows, position, temperature, *((top_k, top_p) if truncated else ()))
    out = fused_logits(logits, weights, members=True, sample=sample)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_logits(logits, weights, members=True, sample=sample, out=out)
    for step in range(1, 20):
        position.fill_(step)
        logits[0].normal_()
        weights[1:].copy_((torch.rand(2, 8) < 0.5) * 0.7)
        temperature.copy_(torch.arange(8) % 3 * 0.5)
        seed.add_(rows)
        top_k.copy_(torch.arange(8) * step % 7 * 20)
        top_p.copy_(1 - torch.arange(8) % 4 * 0.2)
        graph.replay()
        expected = fused_logits(logits, weights, members=True, sample=sample)
        for name in ("token", "sample_token", "logprob", "sample_logprob"):
            assert torch.equal(getattr(out, name), getattr(expected, name)), name
        assert torch.equal(out.member_logprob.isnan(), weights == 0)
        greedy = temperature == 0
        assert torch.equal(out.sample_token[greedy], out.token[greedy])
