"""Attention of new positions over their slots of a static KV cache, on a GPU: one launch.

    out = softmax(q kᵀ / sqrt(C)) v       over the keys 0 .. position of the sequence, by the online softmax

A program has one position and one key head: the queries that share it (padded to the 16 rows of a matmul), its keys and
values in blocks, as many as the slot has filled. That number is read from device memory, so one CUDA graph serves every
length. A position's bits depend neither on the other positions of the batch nor on the capacity of the cache.

Bytes: keys and values once for each position, which is the lower bound of a step; a prompt reads keys again from L2.

    R positions  H query heads  K key/value heads  G = H/K  C head width  S keys  P positions of a cache
    J = 2 * K * C numbers of each
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import SHORT, Variant, launch, recording

# Bytes of a block of keys of one head: 64 keys of 128 channels in half precision, 32 in float32, more would spill.
BLOCK_BYTES, MOST_KEYS, LEAST_KEYS = 16_384, 64, 16
LEAST_ROWS = 16  # of a matmul
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _decode_attention_kernel(
    query_RQ, entries_PJ, slot_R, out_RQ, capacity, entry_stride, kv_heads, groups, width, scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    position, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group_G, channel_C, key_S = tl.arange(0, GROUPS), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    inside_C = channel_C < width
    # queries are in the order (G, K, C)
    offset_GC = (position * groups * kv_heads + group_G[:, None] * kv_heads + head) * width + channel_C[None, :]
    inside_GC = (group_G < groups)[:, None] & inside_C[None, :]
    q_GC = tl.load(query_RQ + offset_GC, mask=inside_GC, other=0.0)
    slot = tl.load(slot_R + position)
    last = slot % capacity
    base = entries_PJ + (slot - last) * entry_stride + head * width
    peak_G = tl.full((GROUPS,), float("-inf"), tl.float32)
    total_G = tl.zeros((GROUPS,), tl.float32)
    out_GC = tl.zeros((GROUPS, WIDTH), tl.float32)
    for start in range(0, last + 1, KEYS):
        seen_S = start + key_S <= last
        entry_SC = base + (start + key_S)[:, None].to(tl.int64) * entry_stride + channel_C[None, :]
        inside_SC = seen_S[:, None] & inside_C[None, :]
        k_SC = tl.load(entry_SC, mask=inside_SC, other=0.0)
        v_SC = tl.load(entry_SC + kv_heads * width, mask=inside_SC, other=0.0)
        if EXACT:
            x_GS = tl.dot(q_GC.to(tl.float32), k_SC.to(tl.float32).T, input_precision="ieee") * scale
        else:
            x_GS = tl.dot(q_GC, k_SC.T) * scale
        x_GS = tl.where(seen_S[None, :], x_GS, float("-inf"))
        new_G = tl.maximum(peak_G, tl.max(x_GS, axis=1))
        rescale_G = tl.exp(peak_G - new_G)
        p_GS = tl.exp(x_GS - new_G[:, None])
        total_G = total_G * rescale_G + tl.sum(p_GS, axis=1)
        out_GC *= rescale_G[:, None]
        if EXACT:
            out_GC = tl.dot(p_GS, v_SC.to(tl.float32), out_GC, input_precision="ieee")
        else:
            out_GC = tl.dot(p_GS.to(v_SC.dtype), v_SC, out_GC)
        peak_G = new_G
    tl.store(out_RQ + offset_GC, (out_GC / total_G[:, None]).to(out_RQ.dtype.element_ty), mask=inside_GC)


def decode_attention(
    query_RQ: Tensor, entries_PJ: Tensor, slot_R: Tensor, capacity: int, kv_heads: int, width: int
) -> Tensor:
    """(R, H * C), in the order (G, K, C) that the queries have.

    query_RQ: (R, H * C) contiguous, of the cache's dtype.   entries_PJ: the first `capacity` positions are those of
    KV slot 0, the next those of slot 1: keys and then values of each.   slot_R: int64, each position's index among
    them; its keys and values are already written.
    """
    out_RQ = torch.empty_like(query_RQ)
    groups = query_RQ.shape[1] // (kv_heads * width)
    # The interpreter multiplies bf16 as if it were integers; a product of two bf16 numbers is exact in float32.
    exact = os.environ.get("TRITON_INTERPRET") == "1" or query_RQ.dtype == torch.float32
    padded = max(LEAST_ROWS, triton.next_power_of_2(width))
    switches = {
        "GROUPS": max(LEAST_ROWS, triton.next_power_of_2(groups)),
        "WIDTH": padded,
        "KEYS": max(LEAST_KEYS, min(MOST_KEYS, BLOCK_BYTES // (padded * query_RQ.dtype.itemsize))),
        "EXACT": exact,
    }
    shape = capacity, entries_PJ.stride(0), kv_heads, groups, width, width**-0.5
    positional = query_RQ, entries_PJ, slot_R, out_RQ, *shape
    launch(_decode_attention_kernel, (len(query_RQ), kv_heads), positional, switches, OPTIONS)
    return out_RQ


def variants() -> Iterator[Variant]:
    """The heads of Llama-3.2-1B and 3B."""
    for dtype, heads, width in ((torch.bfloat16, 32, 64), (torch.bfloat16, 24, 128), (torch.float32, 24, 128)):
        query_RQ = torch.empty(4, heads * width, dtype=dtype)
        entries_PJ, slot_R = torch.empty(1024, 16 * width, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        with recording() as launches:
            decode_attention(query_RQ, entries_PJ, slot_R, 256, 8, width)
        yield Variant("attend", f"C={width} {SHORT[dtype]}", *launches)
