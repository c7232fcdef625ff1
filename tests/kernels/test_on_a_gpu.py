"""What only a GPU can show: graphs, real concurrency, large shapes. The other files run there too, their Triton
half.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import assert_means_the_same

from kernels import Sampling, fused_head, fused_logits, reference, verify
from kernels.types import HeadRequest, Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def logits_of(batch, vocabulary, members=3, dtype=torch.bfloat16):
    torch.manual_seed(batch + vocabulary)
    return [torch.randn(batch, vocabulary, device="cuda", dtype=dtype) * 3 for _ in range(members)]


@pytest.mark.parametrize("batch", [1, 8, 64, 1024])
@pytest.mark.parametrize("vocabulary", [128_256, 50_257])
def test_large_shapes(batch, vocabulary):
    logits = logits_of(batch, vocabulary)
    weights = torch.tensor([1.0, -0.5, 0.7], device="cuda")
    result = fused_logits(logits, weights, members=True, top_k=4, entropy=True)
    for part in torch.arange(batch).split(64):
        request = Request(tuple(l_BV[part] for l_BV in logits), weights, members=True, top_k=4, entropy=True)
        names = ("token", "logprob", "flag", "top_token", "top_logprob", "entropy")
        rows = {name: getattr(result, name)[part] for name in names}
        assert_means_the_same(request, replace(result, **rows, member_logprob=result.member_logprob[:, part]))


def test_a_thousand_launches_give_the_same_bits():
    logits, weights = logits_of(16, 128_256), torch.tensor([1.0, 0.5, 0.25], device="cuda")
    first = fused_logits(logits, weights, entropy=True)
    token, bits = first.token.clone(), first.logprob.view(torch.int32).clone()
    for _ in range(1000):
        again = fused_logits(logits, weights, entropy=True, out=first)
        assert torch.equal(again.token, token)
        assert torch.equal(again.logprob.view(torch.int32), bits)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 0.9)])
def test_a_captured_step_follows_its_inputs(top_k, top_p):
    logits, weights = logits_of(8, 128_256), torch.tensor([1.0, 0.5, 0.25], device="cuda")
    rows, position = torch.arange(8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    temperature = torch.full((8,), 0.8, device="cuda")
    seed = torch.tensor([3], device="cuda")
    sample = Sampling(seed, rows, position, temperature, top_k, top_p)
    out = fused_logits(logits, weights, sample=sample)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_logits(logits, weights, sample=sample, out=out)
    for step in range(1, 20):
        position.fill_(step)
        logits[0].normal_()
        graph.replay()
        expected = fused_logits(logits, weights, sample=sample)
        assert torch.equal(out.token, expected.token)
        assert torch.equal(out.sample_token, expected.sample_token)
        assert torch.equal(out.logprob, expected.logprob)


def test_a_captured_verification():
    torch.manual_seed(0)
    logits = [torch.randn(6, 5, 128_256, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    weights = torch.tensor([1.0, 0.5], device="cuda")
    draft = torch.zeros(6, 4, dtype=torch.int64, device="cuda")
    out = verify(logits, weights, draft)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verify(logits, weights, draft, out=out)
    best = fused_logits([l_BTV.flatten(0, 1) for l_BTV in logits], weights).token.view(6, 5)
    for length in range(5):
        draft.copy_(best[:, :4])
        if length < 4:
            draft[:, length] += 1
        graph.replay()
        assert out.accepted.tolist() == [length] * 6
        assert torch.equal(out.token, best[:, length])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_the_fused_head(rows, dtype):
    torch.manual_seed(rows)
    widths = (256, 128)
    hidden = tuple(torch.randn(rows, width, device="cuda", dtype=dtype) for width in widths)
    output = tuple(torch.randn(50_000, width, device="cuda", dtype=dtype) / 8 for width in widths)
    weights, given = torch.tensor([1.0, -0.5], device="cuda"), torch.randint(0, 50_000, (rows, 1), device="cuda")
    result = fused_head(hidden, output, weights, given=given)
    truth = reference.fused_head(HeadRequest(hidden, output, weights, given), torch.float64)
    torch.testing.assert_close(result.logprob, truth.logprob, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.given_logprob, truth.given_logprob, rtol=0, atol=1e-3)
