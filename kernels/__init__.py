"""Kernels of the decoding step: the weighted sum of logits and what is asked of it, and packed linear layers.

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

from kernels.request import (
    MAX_GIVEN,
    MAX_TOP_K,
    FusedLogits,
    Request,
    Sampling,
    check_logits,
    check_weights,
    describe_flag,
)

__all__ = ["FusedLogits", "Sampling", "describe_flag", "fused_logits"]


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
        from kernels import fused_logits as triton_path

        return triton_path.run(request, out)
    if kind == "cpu":
        from kernels import fused_logits_cpu as cpu_path

        result = cpu_path.run(request)
    else:
        from kernels import reference

        result = reference.fused_logits(request)
    return result if out is None else out.copy_(result)


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
    sample: a draw, see `Sampling`.   out: an earlier result of the same request, overwritten; nothing is allocated.
    Raises ValueError for shapes, dtypes and devices that do not fit. What is wrong with the *values* is told by
    `flag` (see `describe_flag`), which the engine reads with the tokens: no wait here.
    """
    logits = check_logits(logits, dims=2)
    batch, vocabulary = logits[0].shape
    weights = check_weights(weights, len(logits), batch, logits[0].device)
    if not 0 <= top_k <= min(MAX_TOP_K, vocabulary):
        raise ValueError(f"top_k must be 0 to {min(MAX_TOP_K, vocabulary)}, found {top_k}")
    if given is not None:
        if given.dim() == 1:
            given = given[:, None]
        if given.dim() != 2 or given.shape[0] != batch or not 1 <= given.shape[1] <= MAX_GIVEN:
            raise ValueError(f"given must be ({batch},) or ({batch}, 1 to {MAX_GIVEN}), found {tuple(given.shape)}")
    request = Request(logits, weights, members=members, top_k=top_k, entropy=entropy, given=given, sample=sample)
    return _run(request, out)
