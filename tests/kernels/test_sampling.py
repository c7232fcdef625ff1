"""Samples: the right distribution, nothing outside what is kept, and the same sample in any batch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import BOTH_PATHS, cases, device
from scipy.stats import chisquare

from kernels import Sampling, fused_logits, reference
from kernels.philox import gumbel, philox
from kernels.types import check_sampling

VOCABULARY, SAMPLES, ROWS = 1000, 100_000, 2500


def logits_of_two(where="cpu"):
    generator = torch.Generator().manual_seed(1)
    first_V = torch.randn(VOCABULARY, generator=generator) * 2
    second_V = (torch.randn(VOCABULARY, generator=generator) * 2).bfloat16()
    second_V[::7] = -torch.inf
    return first_V.to(where), second_V.to(where)


def samples(logits, number=SAMPLES, seed=77, **truncation):
    """`number` samples of one distribution: rows that share their memory, positions that differ."""
    where = logits[0].device
    tokens = []
    for start in range(0, number, ROWS):
        rows = min(ROWS, number - start)
        position = torch.arange(start, start + rows, device=where)
        sample = Sampling(seed, torch.full_like(position, 5), position, **truncation)
        tokens.append(fused_logits([l_V.expand(rows, -1) for l_V in logits], [1.0, -0.5], sample=sample).sample_token)
    return torch.cat(tokens).cpu()


def exact_V(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution by sorting, in float64, written without the code under test."""
    x_V = logits[0].double() - 0.5 * logits[1].double()
    x_V = x_V.masked_fill(logits[1] == -torch.inf, -torch.inf)
    p_V = torch.softmax(x_V / temperature, dim=0)
    order = p_V.argsort(descending=True)
    sorted_V = p_V[order]
    kept = torch.ones_like(sorted_V, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    kept &= sorted_V.cumsum(0) - sorted_V < top_p
    q_V = torch.zeros_like(p_V)
    q_V[order[kept]] = sorted_V[kept]
    return q_V / q_V.sum()


@pytest.mark.parametrize("number", [SAMPLES // 5, pytest.param(SAMPLES, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 20, 1.0), (1.0, 0, 0.6), (1.5, 300, 0.8)]
)
def test_samples_follow_the_exact_distribution(temperature, top_k, top_p, number):
    logits = logits_of_two()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    p_V = exact_V(logits, **options)
    counts_V = torch.bincount(samples(logits, number, **options), minlength=VOCABULARY).double()
    assert counts_V[p_V == 0].sum() == 0
    # cells below five expected samples are joined, as the test's approximation needs
    large_V = p_V * number >= 5
    observed = torch.cat([counts_V[large_V], counts_V[~large_V].sum()[None]])
    expected = torch.cat([p_V[large_V], p_V[~large_V].sum()[None]]) * number
    some = expected > 0
    outcome = chisquare(observed[some].numpy(), (expected / expected.sum() * number)[some].numpy())
    assert outcome.pvalue > 1e-3, outcome


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (300, 0.6), slow(1, 1.0), slow(20, 1.0), slow(0, 0.6), slow(0, 1e-6), slow(300, 0.8)]
)
def test_all_paths_sample_the_same(monkeypatch, top_k, top_p):
    tokens = {}
    for name in ("cpu", "eager", "triton"):
        monkeypatch.setenv("COLLAB_KERNELS", name)
        tokens[name] = samples(logits_of_two(device(name)), 5, top_k=top_k, top_p=top_p)
    assert torch.equal(tokens["cpu"], tokens["eager"])
    assert torch.equal(tokens["cpu"], tokens["triton"])
    if top_k == 1 or top_p == 1e-6:
        assert (tokens["cpu"] == exact_V(logits_of_two()).argmax()).all()


TOP_K, TOP_P = st.sampled_from((0, 1, 5, 1000)), st.sampled_from((1.0, 0.9, 0.3))


@BOTH_PATHS
@given(case=cases(vocabularies=(1, 2, 7, 130, 1000)), data=st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_sample_is_one_of_the_kept_tokens(path, case, data):
    truncation = dict(zip(("top_k", "top_p"), data.draw(st.tuples(TOP_K, TOP_P))))
    rows = torch.arange(case.batch, device=device(path))
    sample = Sampling(case.seed, rows, rows + 3, temperature=data.draw(st.sampled_from((0.5, 1.0, 3.0))), **truncation)
    request = case.request(device(path))
    result = fused_logits(request.logits, request.weights, sample=sample)
    x_RV, flag_R = reference.combine(request, torch.float64)
    assert torch.equal(result.flag, flag_R)
    fine_R = flag_R == 0
    assert (result.sample_token[~fine_R] == -1).all()
    full = check_sampling(sample, case.batch, rows.device)
    for row in torch.nonzero(fine_R)[:, 0].tolist():
        token = int(result.sample_token[row])
        x_V = x_RV[row]
        size = max(1e-5, float(x_V[x_V > -torch.inf].abs().max()) * 1e-5)
        assert x_V[token] > -torch.inf
        if full.top_k is not None:
            of_row = [values[row : row + 1] for values in (full.temperature, full.top_k, full.top_p)]
            assert x_V[token] >= reference.threshold(x_V[None], *of_row)[0] - size


def test_equal_tokens_are_kept_or_dropped_together():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).repeat(2, 1)
    top_k, top_p = torch.tensor([2, 0]), torch.tensor([1.0, 0.7])
    assert reference.threshold(logits, torch.ones(2), top_k, top_p).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, words):
    """Known answers that come with the authors' Random123 library for philox4x32-10."""
    found = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in found) == words


def test_noise_in_float32_is_that_of_float64():
    words = torch.cat([torch.arange(3000), torch.randint(0, 2**32, (5000,)), 2**32 - 1 - torch.arange(200)])
    truth = gumbel(words, torch.float64)
    found = gumbel(words)
    assert found.isfinite().all()
    # near u = 1, where the noise is lowest and decides nothing, float32 has no finer steps
    ordinary = words < 2**32 - 2**25
    assert ((found - truth).abs() <= 2e-5 * (1 + truth.abs()))[ordinary].all()
