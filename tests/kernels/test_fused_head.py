"""The fused output layers against matrix products in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import device

from kernels import fused_head, reference
from kernels.types import NAN


def tensors(rows, vocabulary, widths, dtypes, seed, where):
    generator = torch.Generator().manual_seed(seed)
    kinds = list(zip(widths, dtypes, strict=True))
    hidden = [torch.randn(rows, d, generator=generator).to(where, t) for d, t in kinds]
    return hidden, [(torch.randn(vocabulary, d, generator=generator) * 3 / d**0.5).to(where, t) for d, t in kinds]


@given(
    rows=st.sampled_from((1, 3, 65)),
    vocabulary=st.sampled_from((1, 7, 129, 1000, 4097)),
    widths=st.lists(st.sampled_from((1, 16, 33, 64)), min_size=1, max_size=3),
    half=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    per_row=st.booleans(),
    moments=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_result_means_what_float64_says(path, rows, vocabulary, widths, half, per_row, moments, seed):
    dtypes = [half if number % 2 == 0 else torch.float32 for number in range(len(widths))]
    hidden, output = tensors(rows, vocabulary, widths, dtypes, seed, device(path))
    weights = torch.tensor([1.0, -0.5, 2.0])[: len(widths)].to(device(path))
    if per_row:
        weights = (weights[:, None] * (1 + torch.arange(rows, device=device(path)) % 3)).contiguous()
    generator = torch.Generator().manual_seed(seed)
    targets_RG = torch.randint(-1, vocabulary + 1, (rows, 2), generator=generator).to(device(path))
    result = fused_head(hidden, output, weights, targets=targets_RG, moments=moments)
    truth = reference.fused_head(hidden, output, weights, targets_RG, moments, torch.float64)
    # |h||W| bounds each logit, so a few roundings of it bound the difference
    sizes = sum(
        w.abs().max() * h_RD.double().norm(dim=1).max() * o_VD.double().norm(dim=1).max()
        for w, h_RD, o_VD in zip(weights, hidden, output, strict=True)
    )
    allowed = 1e-5 + 8 * 2.0**-23 * float(sizes)
    assert torch.equal(result.flag, truth.flag)
    assert ((result.logprob - truth.logprob).abs() <= allowed).all()
    assert torch.equal(result.target_logprob.isnan(), truth.target_logprob.isnan())
    assert ((result.target_logprob - truth.target_logprob).abs().nan_to_num(0) <= 2 * allowed).all()
    same_R = result.token == truth.token
    assert same_R.float().mean() > 0.9
    if moments:
        assert ((result.mean - truth.mean).abs() <= 20 * allowed).all()
        assert ((result.covariance - truth.covariance).abs() <= 100 * allowed).all()
        assert ((result.target_logits - truth.target_logits).abs().nan_to_num(0) <= allowed).all()


def test_moments_are_the_derivatives_of_log_z():
    """Autograd as the witness: the gradient of log Z in the weights is the mean, its Hessian the covariance."""
    hidden, output = tensors(1, 5000, (24, 16, 8), [torch.float32] * 3, 4, "cpu")
    logits_NV = torch.stack([(h_RD.double() @ o_VD.double().T)[0] for h_RD, o_VD in zip(hidden, output, strict=True)])
    weights = torch.tensor([1.0, 0.5, -0.7])

    def log_z(w_N):
        return torch.logsumexp(w_N @ logits_NV, dim=0)

    result = fused_head(hidden, output, weights, moments=True)
    gradient = torch.autograd.functional.jacobian(log_z, weights.double())
    hessian = torch.autograd.functional.hessian(log_z, weights.double())
    torch.testing.assert_close(result.mean[:, 0].double(), gradient, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.covariance[:, :, 0].double(), hessian, rtol=1e-5, atol=1e-5)


def test_a_wrong_hidden_state_is_flagged(path):
    hidden, output = tensors(3, 300, (16, 16), [torch.float32] * 2, 1, device(path))
    hidden[1][2, 3] = torch.nan
    targets_R = torch.zeros(3, dtype=torch.int64, device=device(path))
    for moments in (False, True):
        result = fused_head(hidden, output, [1.0, 1.0], targets=targets_R, moments=moments)
        assert result.flag.tolist() == [0, 0, NAN * 16 + 2], moments
        assert result.token[2] == -1
        assert result.target_logprob[2].isnan().all()


def test_what_does_not_fit_is_refused():
    hidden, output = tensors(2, 10, (4, 6), [torch.float32] * 2, 0, "cpu")
    with pytest.raises(ValueError, match=r"member 0 must be \(10, 4\).* found \(10, 6\)"):
        fused_head(hidden, output[::-1], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"member 0 must be .*float32 .* found .*bfloat16"):
        fused_head(hidden, (output[0].bfloat16(), output[1]), [1.0, 1.0])
    with pytest.raises(ValueError, match="must not be zero"):
        fused_head(hidden, output, [1.0, 0.0])
