"""Kernels of the decoding step, the weighted sum of logits and what is asked of it, packed linear layers, and the loss.

    from kernels import fused_logits
    result = fused_logits([logits_l, logits_s], torch.tensor([1.0, 0.5]))
    result.token, result.logprob, result.flag

This file is the one place that picks an implementation: Triton for tensors on a GPU, the CPU path for tensors on a CPU.
`COLLAB_KERNELS=triton|cpu|eager` forces one (`triton` on CPU tensors needs TRITON_INTERPRET=1). Nothing here knows
models. Triton is imported at its first use only, so a machine without it can use the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from kernels.cpu.packed_linear import PackedLinear
from kernels.types import (
    MAX_GIVEN,
    MAX_TOP_K,
    FusedHead,
    FusedLogits,
    HeadRequest,
    Request,
    Sampling,
    Verification,
    check_head,
    check_logits,
    check_sampling,
    check_tokens,
    check_weights,
    copy_into,
    describe_flag,
)

__all__ = [
    "FusedHead",
    "FusedLogits",
    "PackedLinear",
    "Sampling",
    "Verification",
    "backend",
    "describe_flag",
    "fused_head",
    "fused_logits",
    "linear_cross_entropy",
    "verify",
]


def backend(device: torch.device) -> Literal["triton", "cpu", "eager"]:
    """The implementation that tensors on `device` get."""
    forced = os.environ.get("COLLAB_KERNELS", "")
    if not forced:
        return "triton" if device.type == "cuda" else "cpu"
    if forced not in ("triton", "cpu", "eager"):
        raise ValueError(f"COLLAB_KERNELS={forced}: expected triton, cpu or eager")
    if forced == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("COLLAB_KERNELS=triton on CPU tensors needs TRITON_INTERPRET=1")
    if forced == "cpu" and device.type != "cpu":
        raise ValueError(f"COLLAB_KERNELS=cpu cannot read tensors on {device}")
    return forced  # type: ignore[return-value]


def _run(request: Request, out: FusedLogits | None) -> FusedLogits:
    kind = backend(request.device)
    if kind == "triton":
        if request.sample is not None and request.sample.truncated:
            from kernels.triton import top_k_top_p as truncated_sample_triton

            return truncated_sample_triton.run(request, out)
        from kernels.triton import fused_logits as fused_logits_triton

        return fused_logits_triton.run(request, out)
    if kind == "cpu":
        from kernels.cpu import fused_logits as fused_logits_cpu

        with record_function("fused_logits"):  # so a profile of a step knows its operations
            result = fused_logits_cpu.run(request)
    else:
        from kernels import reference

        with record_function("fused_logits"):
            result = reference.fused_logits(request)
    return result if out is None else copy_into(out, result)


def fused_logits(
    logits: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    members: bool = False,
    top_k: int = 0,
    entropy: bool = False,
    given: Tensor | None = None,
    sample: Sampling | None = None,
    out: FusedLogits | None = None,
) -> FusedLogits:
    """Next token of a weighted sum of logits, and what else is asked of that sum, in one read of every logit.

    logits: N <= 8 tensors (B, V), bfloat16, float16 or float32, mixed as they come, any row stride.
    weights: (N,) or (N, B) float32, finite and not zero.   members: each member's own log-probability of the token.
    top_k: the k <= 16 best.   entropy: nats.   given: (B,) or (B, G) int64, G <= 64, log-probabilities of these tokens.
    sample: a draw, see `Sampling`.   out: an earlier result of the same request, overwritten; nothing is allocated
    then, which is what a CUDA graph needs.
    Raises ValueError for shapes, dtypes and devices that do not fit. What is wrong with the *values* is told by
    `flag` (see `describe_flag`), which the engine reads with the tokens: no wait here.
    """
    logits = check_logits(logits, dims=2)
    batch, vocabulary = logits[0].shape
    device = logits[0].device
    weights = check_weights(weights, len(logits), batch, device)
    if not 0 <= top_k <= min(MAX_TOP_K, vocabulary):
        raise ValueError(f"top_k must be 0 to {min(MAX_TOP_K, vocabulary)}, found {top_k}")
    if given is not None:
        given = given[:, None] if given.dim() == 1 else given
        if given.dim() != 2 or given.shape[0] != batch or not 1 <= given.shape[1] <= MAX_GIVEN:
            raise ValueError(f"given must be ({batch},) or ({batch}, 1 to {MAX_GIVEN}), found {tuple(given.shape)}")
        given = check_tokens(given, device, "given")
    if sample is not None:
        sample = check_sampling(sample, batch, device)
    return _run(Request(logits, weights, members, top_k, entropy, given, sample), out)


def verify(
    logits: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    draft: Tensor,
    *,
    out: Verification | None = None,
) -> Verification:
    """How far the combined argmax agrees with drafted tokens, and the token that follows: speculation without the host.

    logits: N tensors (B, T + 1, V), position t predicting draft[:, t] and the last one the token after the whole draft.
    draft: (B, T) int64, T <= 63; -1 pads a shorter draft, no token agrees with it.   weights: (N,) or (N, B) float32.
    out: an earlier result of the same shapes, overwritten.   Raises ValueError as `fused_logits` does, and for logits
    whose (B, T + 1) rows have no common stride.
    """
    logits = check_logits(logits, dims=3)
    batch, every, vocabulary = logits[0].shape
    device = logits[0].device
    if tuple(draft.shape) != (batch, every - 1) or not 2 <= every <= MAX_GIVEN:
        raise ValueError(f"draft must be ({batch}, {every - 1}) for {every} positions, found {tuple(draft.shape)}")
    weights = check_weights(weights, len(logits), batch, device)
    draft = check_tokens(draft, device, "draft")
    if any(logits_BTV.stride(0) != every * logits_BTV.stride(1) for logits_BTV in logits) and batch > 1:
        raise ValueError("the rows of the logits must have one stride over (B, T + 1)")
    rows = tuple(torch.as_strided(l_BTV, (batch * every, vocabulary), (l_BTV.stride(1), 1)) for l_BTV in logits)
    request = Request(rows, weights, draft=draft, every=every)
    kind = backend(device)
    if kind == "triton":
        from kernels.triton import fused_logits as fused_logits_triton

        return fused_logits_triton.verify(request, out)
    if kind == "cpu":
        from kernels.cpu import fused_logits as fused_logits_cpu

        result = fused_logits_cpu.verify(request)
    else:
        from kernels import reference

        result = reference.verify(request)
    return result if out is None else copy_into(out, result)


def fused_head(
    hidden: Sequence[Tensor],
    output: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    given: Tensor | None = None,
    moments: bool = False,
    out: FusedHead | None = None,
) -> FusedHead:
    """Next token of a weighted sum of logits straight from the members' last hidden states: no logits in memory.

    hidden: N <= 8 tensors (R, D_i), of the dtype of their output layer.   output: N tensors (V, D_i), row-major.
    weights: (N,) or (N, R) float32, finite and not zero.   given: (R,) or (R, G) int64, log-probabilities of these
    tokens. moments: mean and covariance of the members' logits under the combined distribution, and their own logits of
    the given tokens (on a GPU this runs in chunks of the vocabulary, as on a CPU).   out: an earlier result,
    overwritten. Raises ValueError for shapes, dtypes and devices that do not fit; values are told by `flag`: here RANGE
    stands for any infinite sum and the member is the one after which the sum is no longer finite.
    """
    hidden, output, given = check_head(hidden, output, given)
    device = hidden[0].device
    weights = check_weights(weights, len(hidden), hidden[0].shape[0], device)
    request = HeadRequest(hidden, output, weights, given, moments)
    kind = backend(device)
    if kind == "triton" and not moments:
        from kernels.triton import fused_head as fused_head_triton

        return fused_head_triton.run(request, out)
    if kind == "eager":
        from kernels import reference

        result = reference.fused_head(request)
    else:
        from kernels import output_moments as fused_head_chunked

        result = fused_head_chunked.run(request)
    return result if out is None else copy_into(out, result)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], nats: a scalar, float32 or wider, for autograd.

    hidden: (R, D).   weight: (V, D) of the same dtype; under autocast the products are in its dtype.   target: (R,)
    int64 in 0..V - 1.   No rows: zero, and zero gradients. The (R, V) logits are never held, see
    linear_cross_entropy_chunked.py. Raises ValueError for shapes and devices that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: (R, D) and (V, D)")
    if tuple(target.shape) != (len(hidden),) or len({hidden.device, weight.device, target.device}) > 1:
        raise ValueError(f"target must be ({len(hidden)},) on {hidden.device}, found {tuple(target.shape)}")
    kind, device_type = backend(hidden.device), hidden.device.type
    compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    if kind == "eager":
        from kernels import reference

        return reference.linear_cross_entropy(hidden, weight, target)
    from kernels import linear_cross_entropy_chunked as chunked

    if kind == "triton":
        from kernels.triton.softmax_minus_target import softmax_minus_target as softmax
    else:
        softmax = chunked.softmax_minus_target
    wanted = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    with torch.autocast(device_type, enabled=False):
        return chunked.LinearCrossEntropy.apply(hidden, weight, target, compute, wanted, softmax)
