"""Softmax and cross-entropy of a chunk of logits, and their gradient in place, in one launch.

    loss = logsumexp(x) - x[target],   x <- softmax(x) - onehot(target)

One program a row: it reads the row for (maximum, sum of exponentials) and again, from L2 where the rows in flight fit,
to write the gradient over it. Bytes: 2 reads and 1 write of every logit; lower bound: 1 read and 1 write.

    C rows of a chunk  V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import SHORT, Variant, launch, recording


@triton.jit
def _cross_entropy_kernel(logits_CV, target_C, loss_C, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_V = logits_CV + row * stride
    target = tl.load(target_C + row)
    at_target = tl.load(row_V + target).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    # every element of the block keeps its own maximum and sum: one reduction at the end of the row, none in the loop
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, V, BLOCK):
        x = tl.load(row_V + at + offsets, mask=at + offsets < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        peak = higher
    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)
    tl.store(loss_C + row, tl.log(row_total) + row_peak - at_target)
    # all of the row has been read by all threads before any of it is overwritten
    tl.debug_barrier()
    scale = 1.0 / row_total
    for at in range(0, V, BLOCK):
        inside = at + offsets < V
        x = tl.load(row_V + at + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - row_peak) * scale - tl.where(at + offsets == target, 1.0, 0.0)
        tl.store(row_V + at + offsets, gradient.to(logits_CV.dtype.element_ty), mask=inside)


# 16 bytes a thread and load in half precision, four loads in flight; not measured on a device yet
BLOCK = 4096
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


def softmax_minus_target(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Turn logits into the gradient of their summed cross-entropy, in place; returns the sum, float32."""
    rows, vocabulary = logits_CV.shape
    if logits_CV.stride(1) != 1 or rows != len(target_C):
        raise ValueError(f"logits must be rows of {len(target_C)} targets, found {tuple(logits_CV.shape)}")
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    positional = logits_CV, target_C, loss_C, logits_CV.stride(0), vocabulary
    launch(_cross_entropy_kernel, (rows,), positional, {"BLOCK": BLOCK}, OPTIONS)
    return loss_C.sum()


def variants() -> Iterator[Variant]:
    for dtype, vocabulary in ((torch.bfloat16, 128_256), (torch.float32, 128_256), (torch.bfloat16, 50_257)):
        logits_CV, target_C = torch.empty(4, vocabulary, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        with recording() as launches:
            softmax_minus_target(logits_CV, target_C)
        aligned = vocabulary % 16 == 0
        name = f"gradient in place {SHORT[dtype]}" + ("" if aligned else ", not aligned")
        yield Variant("linear_cross_entropy", name, *launches, aligned)
