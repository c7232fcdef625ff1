"""A linear layer for one row on a GPU, together with the operations before and after it in a Llama layer: one launch.

    y = W (x * scale) / sqrt(mean(x²) + epsilon) + b        the norm is optional, and works on the sum: it is linear
    gated:   y = silu(gate) * up, the two halves of W's rows
    added:   the residual stream gets y added, in place
    rope:    y are queries, keys and values; RoPE for queries and keys, keys and values go into the cache

Every program reads a few rows of W whole, each thread 16 bytes at a time, several of them in flight; nothing is shared
between programs. Arithmetic in float32, in one order for each shape; a matmul of several rows adds in another one.

Bytes: W once; x once a program, from L2. Lower bound: W's bytes over the device's bandwidth.

    D inputs  O outputs  F feed-forward width (gated: O = 2 * F)  C head width  P positions of a cache
    J = 2 * K * C numbers of each
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Variant, launch, recording

# Rows of W (gated: of either half) and columns that a program reads at once, a thread 16 bytes or more of each row: the
# fastest of eleven by the sum over Llama-3.2-3B's and 1B's shapes on an H200.
PLAIN, GATED, ROPE = (4, 1024), (2, 1024), (8, 512)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _gemv_kernel(
    x_D, scale_D, weight_OD, bias_O, y_O, rope_C, slot_1, entries_PJ, entry_stride, weight_stride,
    O, queries, rotated, width, epsilon,
    D: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, ROPE: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offset_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = offset_O < O
    row_O = tl.minimum(offset_O, O - 1).to(tl.int64)
    offset_D = tl.arange(0, BLOCK_D)
    EVEN: tl.constexpr = D % BLOCK_D == 0
    sum_OD = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    up_OD = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    square_D = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(0, D, BLOCK_D):
        weight_at_OD = weight_OD + row_O[:, None] * weight_stride + (at + offset_D)[None, :]
        inside_D = (at + offset_D < D) | EVEN  # always true folds to loads without masks
        w_OD = tl.load(weight_at_OD, mask=inside_D[None, :], other=0.0)
        x = tl.load(x_D + at + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        if NORM:
            square_D += x * x
            x = x * tl.load(scale_D + at + offset_D, mask=inside_D, other=0.0)
        sum_OD += w_OD.to(tl.float32) * x[None, :]
        if GATED:
            weight_at_OD += O.to(tl.int64) * weight_stride
            w_OD = tl.load(weight_at_OD, mask=inside_D[None, :], other=0.0)
            up_OD += w_OD.to(tl.float32) * x[None, :]
    sum_O = tl.sum(sum_OD, axis=1)
    factor = 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(square_D, axis=0) / D + epsilon)
        sum_O *= factor
    if BIAS:
        sum_O += tl.load(bias_O + row_O).to(tl.float32)
    if GATED:
        up_O = tl.sum(up_OD, axis=1) * factor
        if BIAS:
            up_O += tl.load(bias_O + O + row_O).to(tl.float32)
        sum_O = sum_O / (1.0 + tl.exp(-sum_O)) * up_O
    if ADDED:
        sum_O += tl.load(y_O + offset_O, mask=inside_O, other=0.0)
    if ROPE:
        rope_O = tl.load(rope_C + offset_O % width)
        cos, sin = tl.split(tl.reshape(rope_O, (BLOCK_O // 2, 2)))
        a, b = tl.split(tl.reshape(sum_O, (BLOCK_O // 2, 2)))
        rotated_O = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK_O,))
        sum_O = tl.where(offset_O < rotated, rotated_O, sum_O)
        entry_O = entries_PJ + tl.load(slot_1) * entry_stride + (offset_O - queries)
        tl.store(entry_O, sum_O.to(entries_PJ.dtype.element_ty), mask=inside_O & (offset_O >= queries))
        inside_O = offset_O < queries
    tl.store(y_O + offset_O, sum_O.to(y_O.dtype.element_ty), mask=inside_O)


@dataclass(frozen=True)
class NormBefore:
    """RMSNorm before the matmul, with its weights (D,) float32."""

    scale_D: Tensor
    epsilon: float


@dataclass(frozen=True)
class RopeAfter:
    """RoPE and the write into the KV cache after the matmul of queries, keys and values.

    rope_C2: (C/2, 2) float32, cosine and sine for each pair of channels.   slot_1: the position's index among
    entries_PJ (P, J): keys, then values.   queries, keys: heads.
    """

    rope_C2: Tensor
    slot_1: Tensor
    entries_PJ: Tensor
    queries: int
    keys: int

    @property
    def width(self) -> int:
        return 2 * len(self.rope_C2)


def gemv(
    x_1D: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm: NormBefore | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
    rope: RopeAfter | None = None,
) -> Tensor:
    """(1, O) in the weight's dtype; (1, F) gated, the queries (1, H * C) with RoPE, and with `add_to` that tensor.

    x_1D: (1, D) of any float dtype, contiguous in D.   weight_OD: rows contiguous.   add_to: (1, O) float32.
    Raises ValueError for shapes, strides and dtypes that do not fit.
    """
    outputs, inputs = weight_OD.shape
    if tuple(x_1D.shape) != (1, inputs) or x_1D.stride(1) != 1 or weight_OD.stride(1) != 1:
        raise ValueError(f"x must be (1, {inputs}), it and the weight contiguous, found {tuple(x_1D.shape)}")
    if add_to is not None and add_to.dtype != torch.float32:
        raise ValueError(f"add_to must be float32, found {add_to.dtype}")
    if gated:
        outputs //= 2
    block_o, block_d = GATED if gated else PLAIN if rope is None else ROPE
    if rope is not None:
        queries, rotated = rope.queries * rope.width, (rope.queries + rope.keys) * rope.width
        y_1O = x_1D.new_empty((1, queries), dtype=rope.entries_PJ.dtype)
        cache, heads = (rope.rope_C2, rope.slot_1, rope.entries_PJ), (queries, rotated, rope.width)
    else:
        y_1O = x_1D.new_empty((1, outputs), dtype=weight_OD.dtype) if add_to is None else add_to
        cache, heads = (y_1O, y_1O, y_1O), (0, 0, 1)  # not used, like every y_1O below
    scale_D, epsilon = (y_1O, 0.0) if norm is None else (norm.scale_D, norm.epsilon)
    strides = 0 if rope is None else rope.entries_PJ.stride(0), weight_OD.stride(0)
    bias = y_1O if bias_O is None else bias_O
    positional = x_1D, scale_D, weight_OD, bias, y_1O, *cache, *strides, outputs, *heads, epsilon
    switches = {
        "D": inputs,
        "NORM": norm is not None,
        "GATED": gated,
        "ADDED": add_to is not None,
        "ROPE": rope is not None,
        "BIAS": bias_O is not None,
        "BLOCK_O": block_o,
        "BLOCK_D": min(block_d, triton.next_power_of_2(inputs)),
    }
    launch(_gemv_kernel, (triton.cdiv(outputs, block_o),), positional, switches, OPTIONS)
    return y_1O


def variants() -> Iterator[Variant]:
    """The matmuls of a Llama-3.2-1B layer in bf16."""
    width, queries, keys, channels = 2048, 32, 8, 64
    x_1D, stream_1D, scale_D = torch.empty(1, width).bfloat16(), torch.empty(1, width), torch.empty(width)
    norm, slot_1 = NormBefore(scale_D, 1e-5), torch.zeros(1, dtype=torch.int64)
    rope = RopeAfter(torch.empty(channels // 2, 2), slot_1, x_1D.new_empty(256, 2 * keys * channels), queries, keys)
    square, gate_up, qkv = (x_1D.new_empty(rows, width) for rows in (width, 2 * 8192, (queries + 2 * keys) * channels))
    with recording() as launches:
        gemv(x_1D, square)
        gemv(x_1D, square, add_to=stream_1D)
        gemv(stream_1D, gate_up, norm=norm, gated=True)
        gemv(stream_1D, qkv, norm=norm, rope=rope)
    return map(Variant, repeat("row_linear"), ("plain", "added", "norm and gated", "norm and rope"), launches)
