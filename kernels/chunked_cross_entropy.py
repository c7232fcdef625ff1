"""Output layer and cross-entropy, forward and backward, without the (rows x vocabulary) logits.

    loss = sum_r logsumexp(W h_r) - (W h_r)[target_r],   dloss/dlogits = softmax(logits) - onehot(target)

A chunk's logits become their gradient in place, which goes into those of hidden states and weight at once: three
matmuls, as many as without chunks. Backward only multiplies by the gradient of the sum.

Memory over inputs and gradients: one chunk of logits, CHUNK_BYTES. In half precision the matmuls have that dtype, as in
autograd; softmax, sums and the sum of the weight's gradient over chunks are in float32.

    R rows  C rows of a chunk  D width  V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

# Large enough that reading and writing the weight's gradient once a chunk is little beside the chunk's matmuls.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


class LinearCrossEntropy(torch.autograd.Function):
    """Arguments as `kernels.linear_cross_entropy`; `dtype` is that of the matmuls.

    needed: which gradients, (hidden, weight); whether gradients are recorded is not known inside.
    """

    @staticmethod
    def forward(ctx, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, dtype: torch.dtype, needed, softmax):
        vocabulary = weight_VD.shape[0]
        weight = weight_VD.to(dtype)
        total = hidden_RD.new_zeros((), dtype=_wide(dtype))
        d_hidden_RD = torch.empty_like(hidden_RD) if needed[0] else None
        d_weight_VD: Tensor | None = None
        rows, most = len(hidden_RD), max(1, CHUNK_BYTES[hidden_RD.device.type] // (vocabulary * dtype.itemsize))
        size = max(1, -(-rows // max(1, -(-rows // most))))  # equal chunks: a small last one would cost as much
        logits_CV = torch.empty(size, vocabulary, dtype=dtype, device=hidden_RD.device)
        for start in range(0, rows, size):
            hidden_CD = hidden_RD[start : start + size].to(dtype)
            chunk_CV = logits_CV[: len(hidden_CD)]
            torch.mm(hidden_CD, weight.T, out=chunk_CV)
            total += softmax(chunk_CV, target_R[start : start + size])
            if d_hidden_RD is not None:
                d_hidden_RD[start : start + size] = chunk_CV @ weight
            if needed[1] and d_weight_VD is None:
                d_weight_VD = (chunk_CV.T @ hidden_CD).to(_wide(weight_VD.dtype))
            elif d_weight_VD is not None and d_weight_VD.dtype == dtype:
                d_weight_VD.addmm_(chunk_CV.T, hidden_CD)
            elif d_weight_VD is not None:
                d_weight_VD += chunk_CV.T @ hidden_CD
        if needed[1] and d_weight_VD is None:  # no rows
            d_weight_VD = torch.zeros_like(weight_VD)
        ctx.gradients = (d_hidden_RD, d_weight_VD, weight_VD.dtype)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("backward a second time: the first one gave the gradients of the loss away")
        d_hidden_RD, d_weight_VD, weight_dtype = ctx.gradients
        ctx.gradients = None  # changed in place, so only once
        if d_hidden_RD is not None:
            d_hidden_RD.mul_(d_total)
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.mul_(d_total).to(weight_dtype)
        return d_hidden_RD, d_weight_VD, None, None, None, None


def softmax_minus_target(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Turn logits into the gradient of their summed cross-entropy, in place; returns the sum, float32 or wider."""
    wide_CV = logits_CV.to(_wide(logits_CV.dtype))
    peak_C1, best_C1 = wide_CV.max(dim=1, keepdim=True)
    at_target_C1 = wide_CV.gather(1, target_C[:, None])
    torch.softmax(wide_CV, dim=1, out=wide_CV)
    # the best token's probability is 1 / sum(exp(x - peak)), and at least 1 / V: its logarithm is exact enough
    loss = (peak_C1 - wide_CV.gather(1, best_C1).log() - at_target_C1).sum()
    wide_CV.scatter_add_(1, target_C[:, None], wide_CV.new_full((1, 1), -1.0).expand(len(target_C), 1))
    if wide_CV is not logits_CV:
        logits_CV.copy_(wide_CV)
    return loss


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
