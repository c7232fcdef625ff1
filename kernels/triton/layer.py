"""What stands between the products of a Llama's layer, for decoding on a GPU: three launches for some twenty.

    normed:           x += delta;   h = x / sqrt(mean(x²) + epsilon) * scale
    turned_and_stored: queries and keys turned by their positions, keys and values into the cache
    silu_multiplied:  gate / (1 + exp(-gate)) * up

Arithmetic in float32, the residual stream x too; what a product reads next is written in its dtype. Bytes: each input
and output once, some D numbers a row, which is nothing beside the weights: with few rows such a launch takes what a
launch takes, and what counts is their number.

A program reads one row (normed), some heads of one (turned_and_stored) or a range of one (silu_multiplied): a row's
bits do not depend on the others, and how a sum is added depends on D alone.

    R positions  D model width  O outputs of the joined product  H query heads  K key/value heads  C head width
    F feed-forward width  P positions of a cache  J = 2 * K * C numbers of each
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads of one row that a program of turned_and_stored takes: at C = 64 in bf16 a thread loads 16 bytes.
HEADS = 4
SILU_BLOCK = 2048
OPTIONS = {kernel: {"num_warps": warps, "enable_fp_fusion": False} for kernel, warps in (("row", 8), ("heads", 1))}


@triton.jit
def _norm_kernel(
    stream_RD, delta_RD, scale_D, normed_RD, stream_stride, delta_stride, normed_stride, D, epsilon,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset_D = tl.arange(0, BLOCK)
    inside_D = offset_D < D
    x_D = tl.load(stream_RD + row * stream_stride + offset_D, mask=inside_D, other=0.0)
    if ADDS:
        x_D += tl.load(delta_RD + row * delta_stride + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        tl.store(stream_RD + row * stream_stride + offset_D, x_D, mask=inside_D)
    length = tl.sqrt(tl.sum(x_D * x_D, axis=0) / D + epsilon)
    y_D = x_D / length * tl.load(scale_D + offset_D, mask=inside_D, other=0.0)
    tl.store(normed_RD + row * normed_stride + offset_D, y_D.to(normed_RD.dtype.element_ty), mask=inside_D)


@triton.jit
def _turn_kernel(
    qkv_RO, turn_RC, slot_R, query_RQ, entries_PJ, qkv_stride, turn_stride, entry_stride, queries, turned, every, width,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head_N1 = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel_C = tl.arange(0, WIDTH)
    inside_NC = (head_N1 < every) & (channel_C < width)[None, :]
    offset_NC = head_N1 * width + channel_C[None, :]
    x_NC = tl.load(qkv_RO + row * qkv_stride + offset_NC, mask=inside_NC, other=0.0).to(tl.float32)
    turn_C = tl.load(turn_RC + row * turn_stride + channel_C, mask=channel_C < width, other=0.0)
    cos_C, sin_C = tl.split(tl.reshape(turn_C, (WIDTH // 2, 2)))
    a_NC, b_NC = tl.split(tl.reshape(x_NC, (HEADS, WIDTH // 2, 2)))
    cos_C, sin_C = cos_C[None, :], sin_C[None, :]
    turned_NC = tl.reshape(tl.join(a_NC * cos_C - b_NC * sin_C, a_NC * sin_C + b_NC * cos_C), (HEADS, WIDTH))
    x_NC = tl.where(head_N1 < turned, turned_NC, x_NC)
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


def normed(
    stream_RD: Tensor, scale_D: Tensor, epsilon: float, dtype: torch.dtype, delta_RD: Tensor | None = None
) -> Tensor:
    """(R, D) in `dtype`: RMSNorm of the stream's rows (float32, any row stride), after delta (any dtype) is added to
    them in place.
    """
    normed_RD = torch.empty(stream_RD.shape, dtype=dtype, device=stream_RD.device)
    _launch(_norm_kernel, (len(stream_RD),), *norm_arguments(stream_RD, scale_D, epsilon, normed_RD, delta_RD))
    return normed_RD


def norm_arguments(
    stream_RD: Tensor, scale_D: Tensor, epsilon: float, normed_RD: Tensor, delta_RD: Tensor | None
) -> tuple[tuple, dict, dict]:
    """Positional arguments, switches and options of a launch; so do the next two."""
    width = stream_RD.shape[1]
    delta = stream_RD if delta_RD is None else delta_RD
    strides = stream_RD.stride(0), delta.stride(0), normed_RD.stride(0)
    switches = {"ADDS": delta_RD is not None, "BLOCK": triton.next_power_of_2(width)}
    return (stream_RD, delta, scale_D, normed_RD, *strides, width, epsilon), switches, OPTIONS["row"]


def turned_and_stored(
    qkv_RO: Tensor, turn_RHC: Tensor, slot_R: Tensor, entries_PJ: Tensor, queries: int, keys: int
) -> Tensor:
    """(R, H * C) queries, turned, in the cache's dtype; turned keys and values go to rows `slot_R` of the cache.

    qkv_RO: `queries` heads, `keys` heads of keys and as many of values, the pairs of channels that turn together side
    by side.   turn_RHC: complex, the same for every head.   entries_PJ: keys and then values of each position.
    """
    width = 2 * turn_RHC.shape[-1]
    query_RQ = torch.empty((len(qkv_RO), queries * width), dtype=entries_PJ.dtype, device=qkv_RO.device)
    arguments = turn_arguments(qkv_RO, torch.view_as_real(turn_RHC), slot_R, query_RQ, entries_PJ, queries, keys)
    _launch(_turn_kernel, (len(qkv_RO), triton.cdiv(queries + 2 * keys, HEADS)), *arguments)
    return query_RQ


def turn_arguments(
    qkv_RO: Tensor, turn_RHC2: Tensor, slot_R: Tensor, query_RQ: Tensor, entries_PJ: Tensor, queries: int, keys: int
) -> tuple[tuple, dict, dict]:
    width = 2 * turn_RHC2.shape[2]
    strides = qkv_RO.stride(0), turn_RHC2.stride(0), entries_PJ.stride(0)
    heads = queries, queries + keys, queries + 2 * keys
    switches = {"HEADS": HEADS, "WIDTH": triton.next_power_of_2(width)}
    return (qkv_RO, turn_RHC2, slot_R, query_RQ, entries_PJ, *strides, *heads, width), switches, OPTIONS["heads"]


def silu_multiplied(gate_up_RO: Tensor) -> Tensor:
    """(R, F) in the same dtype: silu of the first half of each row times the second."""
    rows, outputs = gate_up_RO.shape
    out_RF = torch.empty((rows, outputs // 2), dtype=gate_up_RO.dtype, device=gate_up_RO.device)
    grid = rows, triton.cdiv(outputs // 2, SILU_BLOCK)
    _launch(_silu_kernel, grid, *silu_arguments(gate_up_RO, out_RF))
    return out_RF


def silu_arguments(gate_up_RO: Tensor, out_RF: Tensor) -> tuple[tuple, dict, dict]:
    return (gate_up_RO, out_RF, out_RF.shape[1], gate_up_RO.stride(0)), {"BLOCK": SILU_BLOCK}, OPTIONS["row"]


def _launch(kernel: Any, grid: tuple[int, ...], positional: tuple, switches: dict, options: dict) -> None:
    kernel[grid](*positional, **switches, **options)
