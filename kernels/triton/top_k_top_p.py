"""A sample under top-k (any k) and top-p on a GPU, exact, without sorting.

A token is kept if fewer than k tokens are strictly larger and if those have a mass below p (reference.threshold): the
kept tokens are those with x >= t. The smallest such t is found digit by digit: floats in the order of their bits as
32-bit keys, 4 bits a launch, in which every program counts, for the 15 candidates of the next digit, the tokens above
and their mass. Counts and masses are 64-bit integers (a mass is exp((x - peak) / temperature) in units of 2**-44), so
the order of the atomic additions does not matter. For a row with k = 0 and p = 1 every digit is 0: all is kept.

Bytes: N * B * V * itemsize ten times: for the peak, for eight digits, and by the fused kernel that samples among x >= t
and computes what else was requested. The host does not wait.

    R rows (the batch)  V vocabulary  N members  C entries of a split
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from kernels.triton import fused_logits
from kernels.triton.combine import (
    FLOAT32_MAX,
    ROW_SCALE,
    checked_sum,
    logits_arguments,
    ordered_key,
    rows_of,
    weights_of,
    x_at,
)
from kernels.triton.fused_logits import OPTIONS
from kernels.triton.launch import Variant, launch, recording
from kernels.types import SPLIT, FusedLogits, Request, SamplingTensors

DIGITS, DIGIT_BITS = 8, 4
_CANDIDATES = tl.constexpr((1 << DIGIT_BITS) - 1)
_ALL = tl.constexpr(2**63 - 1)  # no count and no mass is larger


@triton.jit
def _digit_kernel(
    l0, l1, l2, l3, l4, l5, l6, l7,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7,
    weights_NR, weight_stride_n, weight_stride_r,
    token_R, temperature_R, top_k_R, top_p_R, key_R, above_R32, ticket_R,
    V, splits, shift,
    N: tl.constexpr, LEFT_OUT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, split = program // splits, program % splits
    row64 = row.to(tl.int64)
    rows = rows_of(
        l0, l1, l2, l3, l4, l5, l6, l7, row64, stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7
    )  # fmt: skip
    weights = weights_of(weights_NR + row * weight_stride_r, weight_stride_n, N)
    offsets_C = split * SIZE + tl.arange(0, SIZE)
    inside_C = offsets_C < V
    x_C, _ = checked_sum(rows, weights, offsets_C, inside_C, N, LEFT_OUT)
    x_C = tl.where(inside_C, x_C, float("-inf"))
    zero_1 = tl.zeros((1,), tl.int32)
    token = tl.load(token_R + row).to(tl.int32)  # -1 for a flagged row, whose sample is not used
    peak = tl.max(x_at(rows, weights, zero_1 + tl.maximum(token, 0), zero_1 == 0, N, LEFT_OUT), axis=0)
    temperature = tl.load(temperature_R + row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)  # greedy: the sample is not used
    scaled_C = (x_C - tl.maximum(peak, -FLOAT32_MAX)) * (1.0 / temperature)
    mass_C = (tl.exp(tl.minimum(scaled_C, 0.0)) * ROW_SCALE).to(tl.int64)
    # 64-bit, so that a candidate past the largest key is larger than all keys
    key_C = ordered_key(x_C).to(tl.int64)
    low = tl.load(key_R + row)
    above = above_R32 + row64 * 32  # counts above candidate 1..15, then masses; 0 and 16 are the whole row's
    tl.atomic_add(above + 16, tl.sum(mass_C, axis=0), sem="relaxed")
    for j in tl.static_range(1, _CANDIDATES + 1):
        larger_C = key_C >= low + (tl.full((), j, tl.int64) << shift)
        tl.atomic_add(above + j, tl.sum(larger_C.to(tl.int64), axis=0), sem="relaxed")
        tl.atomic_add(above + 16 + j, tl.sum(tl.where(larger_C, mass_C, 0), axis=0), sem="relaxed")
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_R + row, 1, sem="acq_rel")
    if ticket == splits - 1:
        tl.debug_barrier()
        tl.store(ticket_R + row, 0)
        offsets = tl.arange(0, 16)
        count_J = tl.load(above + offsets, cache_modifier=".cg")
        mass_J = tl.load(above + 16 + offsets, cache_modifier=".cg")
        total = tl.sum(tl.where(offsets == 0, mass_J, 0), axis=0)
        top_k, top_p = tl.load(top_k_R + row), tl.load(top_p_R + row).to(tl.float32)
        most = tl.where(top_k == 0, _ALL, top_k)
        bound = tl.where(top_p >= 1.0, _ALL, (total.to(tl.float64) * top_p).to(tl.int64))
        # kept as a threshold: key >= low + j << shift are the strictly larger ones of the key just below
        keeps_J = (count_J < most) & (mass_J < bound)
        digit = tl.sum(((keeps_J == 0) & (offsets > 0)).to(tl.int32), axis=0)
        tl.store(key_R + row, low + (digit.to(tl.int64) << shift))
        tl.debug_barrier()  # every warp holds its copy of the counters before they are cleared for the next digit
        tl.store(above + offsets, tl.zeros_like(count_J))
        tl.store(above + 16 + offsets, tl.zeros_like(mass_J))


def run(request: Request, out: FusedLogits | None = None) -> FusedLogits:
    """All results of a request whose sample is truncated, in ten launches."""
    sample = request.sample
    assert sample is not None
    if out is None:
        out = fused_logits.allocate(request)
        above_R32 = torch.zeros((request.batch, 32), dtype=torch.int64, device=out.token.device)
        tickets_R = torch.zeros(request.batch, dtype=torch.int32, device=out.token.device)
        out = replace(out, workspace=(*out.workspace, torch.empty_like(out.token), above_R32, tickets_R))
    fused_logits.run(Request(request.logits, request.weights), replace(out, workspace=out.workspace[:3]))
    keys_R, above_R32, tickets_R = out.workspace[3:]
    keys_R.zero_()
    parameters = sample.temperature, sample.top_k, sample.top_p
    arguments = *logits_arguments(request), out.token, *parameters, keys_R, above_R32, tickets_R
    splits = triton.cdiv(request.vocabulary, SPLIT)
    switches = {"N": len(request.logits), "LEFT_OUT": request.weights.dim() == 2, "SIZE": SPLIT}
    for digit in reversed(range(DIGITS)):
        positional = *arguments, request.vocabulary, splits, digit * DIGIT_BITS
        launch(_digit_kernel, (request.batch * splits,), positional, switches, OPTIONS)
    return fused_logits.run(request, out)


def variants() -> Iterator[Variant]:
    long_R, ones_R = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    sample = SamplingTensors(long_R, long_R, long_R, ones_R, long_R, ones_R)
    request = Request((torch.empty(4, 128_256, dtype=torch.bfloat16),) * 3, torch.ones(3), sample=sample)
    with recording() as launches:
        run(request)
    yield Variant("truncated_sample", "digit N=3 bf16", launches[-3])  # the lowest digit but one
