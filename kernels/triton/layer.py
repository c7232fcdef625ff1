"""The operations between the matmuls of a Llama layer, for decoding on a GPU: three launches instead of about twenty.

    add_rms_norm:   x += delta;   h = x / sqrt(mean(x²) + epsilon) * scale
    rope_and_cache: RoPE of queries and keys, keys and values into the cache
    silu_and_mul:   gate / (1 + exp(-gate)) * up

Arithmetic and the residual stream x are in float32; what a matmul reads next is written in its dtype. Bytes: each input
and output once, which is the lower bound, and little beside the weights: with few rows the launches are the cost.

A program reads one row, some of its heads or a range of it: a row's bits do not depend on the others.

    R positions  D model width  O outputs of the joined matmul  H query heads  K key/value heads  C head width
    F feed-forward width  P positions of a cache  J = 2 * K * C numbers of each
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Variant, launch, recording

# Heads of one row for each program of rope_and_cache: at C = 64 in bf16 a thread loads 16 bytes.
HEADS = 4
SILU_BLOCK = 2048
ROW_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
HEADS_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def _norm_kernel(
    stream_RD, delta_RD, scale_D, normed_RD, stream_stride, delta_stride, normed_stride, D, epsilon,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset_D = tl.arange(0, BLOCK)
    inside_D = offset_D < D
    x_D = tl.load(stream_RD + row * stream_stride + offset_D, mask=inside_D, other=0.0)
    if ADD:
        x_D += tl.load(delta_RD + row * delta_stride + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        tl.store(stream_RD + row * stream_stride + offset_D, x_D, mask=inside_D)
    length = tl.sqrt(tl.sum(x_D * x_D, axis=0) / D + epsilon)
    y_D = x_D / length * tl.load(scale_D + offset_D, mask=inside_D, other=0.0)
    tl.store(normed_RD + row * normed_stride + offset_D, y_D.to(normed_RD.dtype.element_ty), mask=inside_D)


@triton.jit
def _rope_kernel(
    qkv_RO, rope_RC, slot_R, query_RQ, entries_PJ, qkv_stride, rope_stride, entry_stride,
    queries, rotated, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head_N1 = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel_C = tl.arange(0, WIDTH)
    inside_NC = (head_N1 < heads) & (channel_C < width)[None, :]
    offset_NC = head_N1 * width + channel_C[None, :]
    x_NC = tl.load(qkv_RO + row * qkv_stride + offset_NC, mask=inside_NC, other=0.0).to(tl.float32)
    rope_C = tl.load(rope_RC + row * rope_stride + channel_C, mask=channel_C < width, other=0.0)
    cos_C, sin_C = tl.split(tl.reshape(rope_C, (WIDTH // 2, 2)))
    a_NC, b_NC = tl.split(tl.reshape(x_NC, (HEADS, WIDTH // 2, 2)))
    cos_C, sin_C = cos_C[None, :], sin_C[None, :]
    rotated_NC = tl.reshape(tl.join(a_NC * cos_C - b_NC * sin_C, a_NC * sin_C + b_NC * cos_C), (HEADS, WIDTH))
    x_NC = tl.where(head_N1 < rotated, rotated_NC, x_NC)
    query_NC = query_RQ + row * queries * width + offset_NC
    tl.store(query_NC, x_NC.to(query_RQ.dtype.element_ty), mask=inside_NC & (head_N1 < queries))
    entry_NC = entries_PJ + tl.load(slot_R + row) * entry_stride + (offset_NC - queries * width)
    tl.store(entry_NC, x_NC.to(entries_PJ.dtype.element_ty), mask=inside_NC & (head_N1 >= queries))


@triton.jit
def _silu_kernel(gate_up_RO, out_RF, width, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offset_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = offset_F < width
    gate_F = gate_up_RO + row * row_stride + offset_F
    x_F = tl.load(gate_F, mask=inside_F, other=0.0).to(tl.float32)
    y_F = x_F / (1.0 + tl.exp(-x_F)) * tl.load(gate_F + width, mask=inside_F, other=0.0).to(tl.float32)
    tl.store(out_RF + row * width + offset_F, y_F.to(out_RF.dtype.element_ty), mask=inside_F)


def add_rms_norm(
    stream_RD: Tensor, scale_D: Tensor, epsilon: float, dtype: torch.dtype, delta_RD: Tensor | None = None
) -> Tensor:
    """(R, D) in `dtype`: RMSNorm of the stream's rows (float32, any row stride), after adding delta (any dtype) to them
    in place.
    """
    rows, width = stream_RD.shape
    normed_RD = torch.empty((rows, width), dtype=dtype, device=stream_RD.device)
    delta = stream_RD if delta_RD is None else delta_RD
    strides = stream_RD.stride(0), delta.stride(0), normed_RD.stride(0)
    switches = {"ADD": delta_RD is not None, "BLOCK": triton.next_power_of_2(width)}
    positional = stream_RD, delta, scale_D, normed_RD, *strides, width, epsilon
    launch(_norm_kernel, (rows,), positional, switches, ROW_OPTIONS)
    return normed_RD


def rope_and_cache(
    qkv_RO: Tensor, rope_RHC: Tensor, slot_R: Tensor, entries_PJ: Tensor, queries: int, keys: int
) -> Tensor:
    """(R, H * C) rotated queries in the cache's dtype; rotated keys and values go to entries `slot_R` of the cache.

    qkv_RO: `queries` heads, `keys` heads of keys and as many of values, the two channels of a rotated pair side by
    side.   rope_RHC: complex, the same for every head.   entries_PJ: keys and then values of each position.
    """
    rope_RHC2, width = torch.view_as_real(rope_RHC), 2 * rope_RHC.shape[-1]
    query_RQ = torch.empty((len(qkv_RO), queries * width), dtype=entries_PJ.dtype, device=qkv_RO.device)
    strides = qkv_RO.stride(0), rope_RHC2.stride(0), entries_PJ.stride(0)
    heads = queries, queries + keys, queries + 2 * keys
    grid = len(qkv_RO), triton.cdiv(queries + 2 * keys, HEADS)
    positional = qkv_RO, rope_RHC2, slot_R, query_RQ, entries_PJ, *strides, *heads, width
    launch(_rope_kernel, grid, positional, {"HEADS": HEADS, "WIDTH": triton.next_power_of_2(width)}, HEADS_OPTIONS)
    return query_RQ


def silu_and_mul(gate_up_RO: Tensor) -> Tensor:
    """(R, F) in the same dtype: silu of the first half of each row times the second."""
    rows, outputs = gate_up_RO.shape
    out_RF = torch.empty((rows, outputs // 2), dtype=gate_up_RO.dtype, device=gate_up_RO.device)
    positional = gate_up_RO, out_RF, outputs // 2, gate_up_RO.stride(0)
    grid = rows, triton.cdiv(outputs // 2, SILU_BLOCK)
    launch(_silu_kernel, grid, positional, {"BLOCK": SILU_BLOCK}, ROW_OPTIONS)
    return out_RF


def variants() -> Iterator[Variant]:
    """The layer of Llama-3.2-1B in bf16, four rows."""
    rows, width, queries, keys, channels, bf16 = 4, 2048, 32, 8, 64, torch.bfloat16
    stream_RD, delta_RD = torch.empty(rows, width + 16)[:, :width], torch.empty(rows, width, dtype=bf16)
    qkv_RO, gate_up_RO = delta_RD.new_empty(rows, (queries + 2 * keys) * channels), delta_RD.new_empty(rows, 2 * 8192)
    rope_RHC = torch.empty(rows, queries + keys, channels // 2, dtype=torch.complex64)
    slot_R, entries_PJ = torch.zeros(rows, dtype=torch.int64), delta_RD.new_empty(256, 2 * keys * channels)
    with recording() as launches:
        add_rms_norm(stream_RD, torch.empty(width), 1e-5, bf16)
        add_rms_norm(stream_RD, torch.empty(width), 1e-5, bf16, delta_RD)
        rope_and_cache(qkv_RO, rope_RHC, slot_R, entries_PJ, queries, keys)
        silu_and_mul(gate_up_RO)
    names = "norm", "add and norm", "rope and cache", "silu and multiply"
    return map(Variant, repeat("layer"), names, launches)
