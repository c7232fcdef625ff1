"""Output layer and loss in chunks, against autograd over all logits in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import device

import kernels.chunked_cross_entropy as chunked
from kernels import linear_cross_entropy, reference


def tensors(rows, vocabulary, width, dtype, seed, where, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).to(where).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * spread / width**0.5).to(dtype).to(where)
    target = torch.randint(0, vocabulary, (rows,), generator=generator).to(where)
    return hidden, weight.requires_grad_(), target


def truth(hidden, weight, target, scale=1.0):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = reference.linear_cross_entropy(hidden, weight, target)
    (loss * scale).backward()
    return loss, hidden.grad, weight.grad


def close(found, expected, allowed):
    """By norm: single entries of a gradient may cancel to nothing."""
    return (found.double() - expected).norm() <= allowed * expected.norm() + 1e-12


@given(
    rows=st.sampled_from((0, 1, 2, 7, 64)),
    vocabulary=st.sampled_from((1, 2, 129, 1000, 4097)),
    width=st.sampled_from((1, 16, 33)),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    chunk=st.sampled_from((1, 5, 1000)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_loss_and_gradients_are_those_of_all_logits(path, monkeypatch, rows, vocabulary, width, dtype, chunk, seed):
    if path == "triton" and dtype == torch.float64:
        dtype = torch.float32
    monkeypatch.setattr(chunked, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), chunk * vocabulary * dtype.itemsize))
    hidden, weight, target = tensors(rows, vocabulary, width, dtype, seed, device(path))
    loss = linear_cross_entropy(hidden, weight, target)
    (loss * 0.25).backward()
    expected = truth(hidden, weight, target, 0.25)
    allowed = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss - expected[0]) <= allowed * (rows + abs(expected[0]))
    if vocabulary > 2 or dtype == torch.float64:  # with few entries probabilities of nearly one cancel
        assert close(hidden.grad, expected[1], allowed)
        assert close(weight.grad, expected[2], allowed)
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_a_very_unlikely_target_has_a_finite_loss_and_nan_a_nan(path):
    hidden = torch.tensor([[1.0]], device=device(path))
    weight = torch.tensor([[500.0], [0.0], [-300.0]], device=device(path))
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2], device=device(path)))
    assert loss.item() == pytest.approx(800.0)
    with torch.no_grad():
        hidden[0] = torch.nan
        assert linear_cross_entropy(hidden, weight, torch.tensor([2], device=device(path))).isnan()


def test_under_autocast_matmuls_are_half_and_gradients_as_wide_as_the_weights():
    hidden, weight, target = tensors(40, 300, 32, torch.float32, 5, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden.bfloat16(), weight, target).backward()
    assert weight.grad.dtype == torch.float32
    assert close(weight.grad, truth(hidden.bfloat16(), weight, target)[2], 2e-2)


def test_only_what_is_trained_gets_a_gradient(path):
    hidden, weight, target = tensors(9, 100, 8, torch.float32, 1, device(path))
    linear_cross_entropy(hidden, weight.detach(), target).backward()
    assert close(hidden.grad, truth(hidden, weight, target)[1], 2e-6)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, target).requires_grad


def test_a_tied_weight_gets_both_its_gradients(path):
    """The output layer's gradient is a buffer of its own: another use of the weight must add to it, not share it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 8, generator=generator).to(device(path)).requires_grad_()
    tokens, target = (torch.randint(0, 50, (20,), generator=generator).to(device(path)) for _ in range(2))
    exact = weight.detach().double().requires_grad_()
    for _ in range(2):  # and a second micro-batch to what is there
        linear_cross_entropy(torch.nn.functional.embedding(tokens, weight).tanh(), weight, target).backward()
        hidden = torch.nn.functional.embedding(tokens, exact).tanh()
        reference.linear_cross_entropy(hidden, exact, target).backward()
    assert close(weight.grad, exact.grad, 2e-6)


def test_memory_over_inputs_and_gradients_is_one_chunk():
    """1,024 rows of 100,000 logits would be 400 MB."""
    hidden, weight, target = tensors(1024, 100_000, 4, torch.float32, 0, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, target).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1.1 * chunked.CHUNK_BYTES["cpu"]


def test_what_does_not_fit_is_refused():
    hidden, weight, target = tensors(4, 10, 8, torch.float32, 0, "cpu")
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden[:, :4], weight, target)
    with pytest.raises(ValueError, match="target must be"):
        linear_cross_entropy(hidden, weight, target[:2])
