"""The one file that picks an implementation: Triton for tensors on a GPU, the CPU path for tensors on a CPU.

`COLLAB_KERNELS=triton|cpu|eager` forces one (`triton` on CPU tensors needs TRITON_INTERPRET=1). Each implementation is
imported at its first use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from kernels.types import (
    MAX_TOP_K,
    FusedHead,
    FusedLogits,
    Request,
    Sampling,
    check_head,
    check_logits,
    check_sampling,
    check_targets,
    check_weights,
    copy_into,
)


def backend(device: torch.device) -> Literal["triton", "cpu", "eager"]:
    """The implementation for tensors on `device`. Raises ValueError if COLLAB_KERNELS asks for an impossible one."""
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


def fused_logits(
    logits: Sequence[Tensor],
    weights: Tensor | Sequence[Any],
    *,
    members: bool = False,
    top_k: int = 0,
    targets: Tensor | None = None,
    sample: Sampling | None = None,
    out: FusedLogits | None = None,
) -> FusedLogits:
    """Next token of a weighted sum of logits, and what else is requested of that sum, in one read of every logit.

    logits: N <= 8 tensors (B, V), bfloat16, float16 or float32, in any mixture, any row stride.
    weights: (N,) or (N, B) float32, finite. Where a sequence's weight is 0, that member is left out of it: its logits
    may hold anything. A tensor (N,) on a GPU must hold no 0; one (N, B) may.
    members: each member's own log-probability of the token and of the targets.   top_k: the k <= 32 best.
    targets: (B,) or (B, G) int64, G <= 64, log-probabilities of these tokens.   sample: see `Sampling`.
    out: an earlier result of the same request, overwritten; nothing is allocated then, as a CUDA graph needs it.
    Raises ValueError for what does not fit and for a sequence whose weights are all zero (on a GPU flagged as masked).
    What is wrong with logits is reported by `flag`, see `describe_flag`: this function does not wait for the device.
    """
    logits = check_logits(logits)
    (batch, vocabulary), device = logits[0].shape, logits[0].device
    weights = check_weights(weights, len(logits), batch, device)
    if not 0 <= top_k <= min(MAX_TOP_K, vocabulary):
        raise ValueError(f"top_k must be 0 to {min(MAX_TOP_K, vocabulary)}, found {top_k}")
    targets = check_targets(targets, batch, device)
    sampling = None if sample is None else check_sampling(sample, batch, device)
    request = Request(logits, weights, members, top_k, targets, sampling)
    kind = backend(device)
    if kind == "triton":
        from kernels.triton import fused_logits, top_k_top_p

        truncated = sampling is not None and sampling.top_k is not None
        return (top_k_top_p if truncated else fused_logits).run(request, out)
    with record_function("fused_logits"):  # one name for its operations in a profile
        from kernels import reference
        from kernels.cpu import fused_logits as cpu

        result = cpu.run(request) if kind == "cpu" else reference.fused_logits(request)
    return result if out is None else copy_into(out, result)


def fused_head(
    hidden: Sequence[Tensor],
    output: Sequence[Tensor],
    weights: Tensor | Sequence[Any],
    *,
    targets: Tensor | None = None,
    moments: bool = False,
    out: FusedHead | None = None,
) -> FusedHead:
    """Next token of a weighted sum of logits from the members' last hidden states, in chunks of the vocabulary.

    hidden: N <= 8 tensors (B, D_i), of the dtype of their output layer.   output: N tensors (V, D_i), row-major.
    weights: (N,) or (N, B) float32, finite and not zero.   targets: (B,) or (B, G) int64, log-probabilities of these
    tokens.   moments: see `FusedHead`.   out: an earlier result, overwritten. On a GPU each chunk waits for the device.
    Raises ValueError for shapes, dtypes and devices that do not fit; wrong values are reported by `flag`: here OVERFLOW
    stands for any infinite sum and the member is the one after which the sum is no longer finite.
    """
    hidden, output = check_head(hidden, output)
    batch, device = hidden[0].shape[0], hidden[0].device
    weights = check_weights(weights, len(hidden), batch, device, may_be_zero=False)
    targets = check_targets(targets, batch, device)
    from kernels import output_moments, reference

    run = reference.fused_head if backend(device) == "eager" else output_moments.run
    result = run(hidden, output, weights, targets, moments)
    return result if out is None else copy_into(out, result)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], nats: a scalar, float32 or wider, for autograd.

    hidden: (R, D).   weight: (V, D) of the same dtype; under autocast the matmuls are in its dtype.   target: (R,)
    int64 in 0 .. V-1. The (R, V) logits are never held. Raises ValueError for shapes and devices that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: (R, D) and (V, D)")
    if tuple(target.shape) != (len(hidden),) or len({hidden.device, weight.device, target.device}) > 1:
        raise ValueError(f"target must be ({len(hidden)},) on {hidden.device}, found {tuple(target.shape)}")
    kind, device_type = backend(hidden.device), hidden.device.type
    from kernels import chunked_cross_entropy as chunked
    from kernels import reference

    if kind == "eager":
        return reference.linear_cross_entropy(hidden, weight, target)
    softmax_minus_target = chunked.softmax_minus_target
    if kind == "triton":
        from kernels.triton.softmax_minus_target import softmax_minus_target
    compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    needed = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    with torch.autocast(device_type, enabled=False):
        return chunked.LinearCrossEntropy.apply(hidden, weight, target, compute, needed, softmax_minus_target)
