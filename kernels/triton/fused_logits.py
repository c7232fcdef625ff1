"""The weighted sum of logits on a GPU: one launch, one read of every logit, nothing of size (B, V) written.

Mathematics (reference.py has the definition; x = sum_i w_i * logits_i over one row):

    token = argmax x,   logprob = max x - logsumexp x = -log sum_v exp(x_v - max x)

A program reads one split of 4,096 entries of one row from all N members and keeps (maximum, index, sum of exponentials,
flag). The program that finishes a row last (it gets the row's last ticket) joins the splits and writes the results.

Bytes: N * B * V * itemsize read once, which over the device's bandwidth is the lower bound, and 16 a split. `members`
reads its tile a second time, from cache.

A row's bits do not depend on the batch, on alignment or on the compiler's layout: exponentials are added in groups of
four in a fixed order, then as 64-bit integers. Products and sums are not fused, so x has the same bits as on the CPU.

    R rows (the batch)  V vocabulary  N members  S splits  K best  G target tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.combine import (
    FLOAT32_MAX,
    ROW_SCALE,
    checked_sum,
    exact_sum,
    is_used,
    logits_arguments,
    ordered_key,
    rows_of,
    weighted_sum,
    weights_of,
    x_at,
)
from kernels.triton.launch import SHORT, Variant, launch, recording
from kernels.triton.philox import gumbel, random_words
from kernels.types import ALL_MASKED, MAX_VOCABULARY, SPLIT, FusedLogits, Request, SamplingTensors

_MAX_SPLITS = tl.constexpr(MAX_VOCABULARY // SPLIT)
_ALL_MASKED = tl.constexpr(ALL_MASKED)
_LAST = tl.constexpr(0x7FFFFFFF)
_SUM_SCALE = tl.constexpr(2.0**50)  # a split's sum is at most 4,096 = 2**12: 62 bits


@triton.jit
def _fused_logits_kernel(
    l0, l1, l2, l3, l4, l5, l6, l7,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7,
    weights_NR, weight_stride_n, weight_stride_r,
    token_R, logprob_R, flag_R,
    member_logprob_NR, member_target_logprob_NRG, top_token_RK, top_logprob_RK, target_RG, target_logprob_RG,
    seed_R, row_id_R, position_R, temperature_R, sample_token_R, sample_logprob_R, threshold_key_R,
    value_RFS, index_RIS, ticket_R,
    R, V, splits, target_count,
    N: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr, TARGETS: tl.constexpr, SAMPLE: tl.constexpr,
    TRUNCATED: tl.constexpr, LEFT_OUT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, split = program // splits, program % splits
    row64 = row.to(tl.int64)
    rows = rows_of(
        l0, l1, l2, l3, l4, l5, l6, l7, row64, stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7
    )  # fmt: skip
    weights = weights_of(weights_NR + row * weight_stride_r, weight_stride_n, N)

    # 1. This split: x, its maximum, index and sum of exponentials.
    start = split * SIZE
    offsets_C = start + tl.arange(0, SIZE)
    inside_C = offsets_C < V
    if start + SIZE <= V:  # without a mask the loads are 16 bytes wide wherever the row is aligned, also for odd V
        x_C = weighted_sum(rows, weights, offsets_C, inside_C, N, False, LEFT_OUT)
    else:
        x_C = weighted_sum(rows, weights, offsets_C, inside_C, N, True, LEFT_OUT)
    flag = 0
    if tl.max(x_C.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0) >= 0x7F800000:
        x_C, code_C = checked_sum(rows, weights, offsets_C, inside_C, N, LEFT_OUT)
        flag = tl.max(code_C, axis=0)
    x_C = tl.where(inside_C, x_C, float("-inf"))
    peak = tl.max(x_C, axis=0)
    shifted_C = x_C - tl.maximum(peak, -FLOAT32_MAX)
    exp_C = tl.exp(shifted_C)
    # Fields of a row's partial results, one line of S splits each; what is not requested has no line.
    FIELDS: tl.constexpr = 2 + 2 * N * MEMBERS + TOP_K + SAMPLE
    INDICES: tl.constexpr = 2 + TOP_K + SAMPLE
    value_S = value_RFS + row64 * FIELDS * splits
    index_S = index_RIS + row64 * INDICES * splits
    tl.store(value_S + split, peak)
    tl.store(value_S + splits + split, exact_sum(exp_C, SIZE, _SUM_SCALE))
    tl.store(index_S + split, tl.min(tl.where(x_C == peak, offsets_C, _LAST), axis=0))
    tl.store(index_S + splits + split, flag)
    if MEMBERS:
        for n in tl.static_range(N):
            used_C = inside_C & is_used(weights[n], offsets_C) if LEFT_OUT else inside_C
            own_C = tl.load(rows[n] + offsets_C, mask=used_C, other=float("-inf")).to(tl.float32)
            own_C = tl.where(tl.abs(own_C) <= FLOAT32_MAX, own_C, float("-inf"))
            own_peak = tl.max(own_C, axis=0)
            own_exp_C = tl.exp(own_C - tl.maximum(own_peak, -FLOAT32_MAX))
            tl.store(value_S + (2 + 2 * n) * splits + split, own_peak)
            tl.store(value_S + (3 + 2 * n) * splits + split, exact_sum(own_exp_C, SIZE, _SUM_SCALE))
    if TOP_K:
        rest_C = x_C
        for k in tl.static_range(TOP_K):
            best = tl.max(rest_C, axis=0)
            best_index = tl.min(tl.where(rest_C == best, offsets_C, _LAST), axis=0)
            rest_C = tl.where(offsets_C == best_index, float("-inf"), rest_C)
            tl.store(value_S + (2 + 2 * N * MEMBERS + k) * splits + split, best)
            tl.store(index_S + (2 + k) * splits + split, best_index)
    if SAMPLE:
        score_C = x_C  # greedy: the best score is the best x
        temperature = tl.load(temperature_R + row)
        if temperature != 0.0:
            seed, row_id, position = tl.load(seed_R + row), tl.load(row_id_R + row), tl.load(position_R + row)
            score_C = x_C * (1.0 / temperature) + gumbel(random_words(seed, row_id, position, start, SIZE))
        score_C = tl.where(x_C > float("-inf"), score_C, float("-inf"))
        if TRUNCATED:
            kept_C = ordered_key(x_C).to(tl.int64) >= tl.load(threshold_key_R + row)
            score_C = tl.where(kept_C, score_C, float("-inf"))
        score = tl.max(score_C, axis=0)
        tl.store(value_S + (FIELDS - 1) * splits + split, score)
        tl.store(index_S + (INDICES - 1) * splits + split, tl.min(tl.where(score_C == score, offsets_C, _LAST), axis=0))

    # 2. The last program of the row joins the splits. The barrier puts all stores of this program before its ticket;
    # the ticket releases them and acquires the others'. Reads go past L1, which may hold lines of an earlier launch.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_R + row, 1, sem="acq_rel")
    if ticket == splits - 1:
        tl.debug_barrier()
        tl.store(ticket_R + row, 0)
        offsets_S = tl.arange(0, _MAX_SPLITS)
        inside_S = offsets_S < splits
        peak_S = tl.load(value_S + offsets_S, mask=inside_S, other=float("-inf"), cache_modifier=".cg")
        total_S = tl.load(value_S + splits + offsets_S, mask=inside_S, other=0.0, cache_modifier=".cg")
        token_S = tl.load(index_S + offsets_S, mask=inside_S, other=_LAST, cache_modifier=".cg")
        flag_S = tl.load(index_S + splits + offsets_S, mask=inside_S, other=0, cache_modifier=".cg")
        row_peak = tl.max(peak_S, axis=0)
        row_flag = tl.max(flag_S, axis=0)
        row_flag = tl.where((row_peak == float("-inf")) & (row_flag == 0), _ALL_MASKED * 16, row_flag)
        if LEFT_OUT:
            weight_size = tl.abs(weights[0])
            for n in tl.static_range(1, N):
                weight_size += tl.abs(weights[n])
            row_flag = tl.where(weight_size == 0.0, _ALL_MASKED * 16, row_flag)
        fine = row_flag == 0
        nan = tl.where(fine, 0.0, float("nan"))
        row_base = tl.maximum(row_peak, -FLOAT32_MAX)
        shift_S = peak_S - row_base
        scale_S = tl.exp(shift_S)
        total = tl.sum((total_S * scale_S * ROW_SCALE).to(tl.int64), axis=0).to(tl.float32) * (1.0 / ROW_SCALE)
        log_total = tl.log(total)
        token = tl.min(tl.where(peak_S == row_peak, token_S, _LAST), axis=0)
        shown = tl.where(fine, token, -1)
        tl.store(token_R + row, shown.to(tl.int64))
        tl.store(logprob_R + row, nan - log_total)
        tl.store(flag_R + row, row_flag)
        picked = token
        if SAMPLE:
            line_S, index_line_S = value_S + (FIELDS - 1) * splits, index_S + (INDICES - 1) * splits
            score_S = tl.load(line_S + offsets_S, mask=inside_S, other=float("-inf"), cache_modifier=".cg")
            sampled_S = tl.load(index_line_S + offsets_S, mask=inside_S, other=_LAST, cache_modifier=".cg")
            score = tl.max(score_S, axis=0)
            picked = tl.min(tl.where(score_S == score, sampled_S, _LAST), axis=0)
            one_1 = tl.zeros((1,), tl.int32)
            x_1 = x_at(rows, weights, one_1 + tl.where(fine, picked, 0), one_1 == 0, N, LEFT_OUT)
            tl.store(sample_token_R + row, tl.where(fine, picked, -1).to(tl.int64))
            tl.store(sample_logprob_R + row + one_1, tl.where(fine, x_1 - row_base - log_total, float("nan")))
        if TARGETS:
            offsets_G = tl.arange(0, TARGETS)
            here_G = offsets_G < target_count
            target_G = tl.load(target_RG + row64 * target_count + offsets_G, mask=here_G, other=-1)
            inside_G = (target_G >= 0) & (target_G < V)
            x_G = x_at(rows, weights, target_G, inside_G, N, LEFT_OUT)
            value_G = tl.where(inside_G & fine, x_G - row_base - log_total, float("nan"))
            tl.store(target_logprob_RG + row64 * target_count + offsets_G, value_G, mask=here_G)
        if MEMBERS:
            for n in tl.static_range(N):
                line_S = value_S + (2 + 2 * n) * splits + offsets_S
                own_peak_S = tl.load(line_S, mask=inside_S, other=float("-inf"), cache_modifier=".cg")
                own_total_S = tl.load(line_S + splits, mask=inside_S, other=0.0, cache_modifier=".cg")
                own_peak = tl.max(own_peak_S, axis=0)
                own_scale_S = tl.exp(own_peak_S - tl.maximum(own_peak, -FLOAT32_MAX))
                own_total = tl.sum((own_total_S * own_scale_S * ROW_SCALE).to(tl.int64), axis=0).to(tl.float32)
                own_log_total = tl.log(own_total * (1.0 / ROW_SCALE))
                used = fine & (weights[n] != 0.0)
                own_value = tl.load(rows[n] + tl.where(used, picked, 0), mask=used, other=0.0).to(tl.float32)
                own_logprob = tl.where(used, own_value - own_peak - own_log_total, float("nan"))
                tl.store(member_logprob_NR + n * R + row, own_logprob)
                if TARGETS:
                    used_G = inside_G & is_used(tl.where(fine, weights[n], 0.0), target_G)
                    at_G = tl.load(rows[n] + target_G, mask=used_G, other=0.0).to(tl.float32)
                    own_G = tl.where(used_G, at_G - own_peak - own_log_total, float("nan"))
                    own_RG = member_target_logprob_NRG + (n * R + row64) * target_count
                    tl.store(own_RG + offsets_G, own_G, mask=here_G)
        if TOP_K:
            offsets_K = tl.arange(0, 16 if TOP_K <= 16 else 32)
            inside_SK = inside_S[:, None] & (offsets_K < TOP_K)[None, :]
            line_SK = offsets_K[None, :] * splits + offsets_S[:, None]
            value_line = value_S + (2 + 2 * N * MEMBERS) * splits
            rest_SK = tl.load(value_line + line_SK, mask=inside_SK, other=float("-inf"), cache_modifier=".cg")
            index_SK = tl.load(index_S + 2 * splits + line_SK, mask=inside_SK, other=_LAST, cache_modifier=".cg")
            for k in tl.static_range(TOP_K):
                best = tl.max(tl.max(rest_SK, axis=1), axis=0)
                best_index = tl.min(tl.min(tl.where(rest_SK == best, index_SK, _LAST), axis=1), axis=0)
                rest_SK = tl.where(index_SK == best_index, float("-inf"), rest_SK)
                exists = fine & (best > float("-inf"))
                tl.store(top_token_RK + row64 * TOP_K + k, tl.where(exists, best_index, -1).to(tl.int64))
                tl.store(top_logprob_RK + row64 * TOP_K + k, tl.where(fine, best - row_base - log_total, float("nan")))


# A split fills 8 warps with 16 entries a thread, without spills at 8 members of float32. Without fusion a product is
# rounded before it is added, as on the CPU.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# For the next token of few members of half precision 64 registers are enough, so that four programs share a
# multiprocessor instead of three: on an H200 20 µs instead of 23 at B = 64, 64 instead of 82 at 256.
REGISTERS, MEMBERS_OF_FEW_REGISTERS, ALIGNED_ENTRIES = 64, 3, 16


def _options(request: Request) -> dict[str, Any]:
    requested = request.members or request.top_k or request.targets is not None or request.sample is not None
    few = len(request.logits) <= MEMBERS_OF_FEW_REGISTERS and all(
        logits_RV.dtype.itemsize == 2 and logits_RV.stride(0) % ALIGNED_ENTRIES == 0 for logits_RV in request.logits
    )
    if torch.version.hip or requested or not few:  # AMD's compiler has no such option
        return OPTIONS
    return OPTIONS | {"maxnreg": REGISTERS}


def allocate(request: Request) -> FusedLogits:
    """Results and working memory of a request, for use as `out` of every later call like it."""
    rows, members, device = request.batch, len(request.logits), request.logits[0].device
    splits = triton.cdiv(request.vocabulary, SPLIT)
    sample = request.sample is not None
    count = 0 if request.targets is None else request.targets.shape[1]
    floats = partial(torch.empty, dtype=torch.float32, device=device)
    tokens = partial(torch.empty, dtype=torch.int64, device=device)
    values_RFS = floats(rows, 2 + 2 * members * request.members + request.top_k + sample, splits)
    indices_RIS = torch.empty((rows, 2 + request.top_k + sample, splits), dtype=torch.int32, device=device)
    tickets_R = torch.zeros(rows, dtype=torch.int32, device=device)  # each launch leaves them zero
    return FusedLogits(
        token=tokens(rows),
        logprob=floats(rows),
        flag=torch.empty(rows, dtype=torch.int32, device=device),
        member_logprob=floats(members, rows) if request.members else None,
        member_target_logprob=floats(members, rows, count) if request.members and count else None,
        top_token=tokens(rows, request.top_k) if request.top_k else None,
        top_logprob=floats(rows, request.top_k) if request.top_k else None,
        target_logprob=floats(rows, count) if count else None,
        sample_token=tokens(rows) if sample else None,
        sample_logprob=floats(rows) if sample else None,
        workspace=(values_RFS, indices_RIS, tickets_R),
    )


def run(request: Request, out: FusedLogits | None = None) -> FusedLogits:
    """Every result of the request in one launch (top_k_top_p.py prepares the thresholds of a truncated sample)."""
    out = out or allocate(request)
    sample, targets = request.sample, request.targets
    count = 0 if targets is None else targets.shape[1]
    values_RFS, indices_RIS, tickets_R, *thresholds = out.workspace
    splits = values_RFS.shape[2]
    sampling = (None,) * 4 if sample is None else (sample.seed, sample.row_id, sample.position, sample.temperature)
    requested = (
        *(out.member_logprob, out.member_target_logprob, out.top_token, out.top_logprob, targets, out.target_logprob),
        *(*sampling, out.sample_token, out.sample_logprob, thresholds[0] if thresholds else None),
    )
    positional = (
        *(*logits_arguments(request), out.token, out.logprob, out.flag),
        *(out.token if tensor is None else tensor for tensor in requested),  # the kernel does not touch those
        *(values_RFS, indices_RIS, tickets_R, request.batch, request.vocabulary, splits, count),
    )
    switches = {
        "N": len(request.logits),
        "MEMBERS": request.members,
        "TOP_K": request.top_k,
        "TARGETS": triton.next_power_of_2(count),
        "SAMPLE": sample is not None,
        "TRUNCATED": sample is not None and sample.top_k is not None,
        "LEFT_OUT": request.weights.dim() == 2,
        "SIZE": SPLIT,
    }
    launch(_fused_logits_kernel, (request.batch * splits,), positional, switches, _options(request))
    return out


def variants() -> Iterator[Variant]:
    """Every combination that launches meet in practice; what can be requested is shown on three members of bf16."""
    mixed = (torch.bfloat16, torch.float16, torch.float32)
    three, eight = mixed[:1] * 3, mixed[2:] * 8
    long_B, targets = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    sample = SamplingTensors(long_B, long_B, long_B, torch.ones(4))
    for dtype in mixed:
        for members in (1, 3, 8):
            yield _variant(f"argmax N={members} {SHORT[dtype]}", (dtype,) * members)
    yield _variant("argmax N=3 mixed", mixed)
    yield _variant("argmax N=3 bf16, rows not aligned", three, vocabulary=50_257)
    yield _variant("weights per row N=3 bf16", three, weights=(3, 4))
    yield _variant("members N=3 bf16", three, members=True)
    yield _variant("members and targets N=3 bf16", three, members=True, targets=targets)
    yield _variant("top_k=16 N=3 bf16", three, top_k=16)
    yield _variant("top_k=32 N=3 bf16", three, top_k=32)
    yield _variant("targets N=3 bf16", three, targets=targets)
    yield _variant("sample N=3 bf16", three, sample=sample)
    everything: dict[str, Any] = {"members": True, "top_k": 16, "sample": sample}
    yield _variant("everything N=3 mixed", mixed, targets=targets, **everything)
    yield _variant("everything N=8 fp32", eight, **everything)
    yield _variant("all, weights per row N=8 fp32", eight, weights=(8, 4), targets=targets, **everything)


def _variant(
    name: str, dtypes: tuple, *, vocabulary: int = 128_256, weights: tuple[int, ...] = (), **requested: Any
) -> Variant:
    logits = tuple(torch.empty(4, vocabulary, dtype=dtype) for dtype in dtypes)
    with recording() as launches:
        run(Request(logits, torch.ones(weights or len(dtypes)), **requested))
    return Variant("fused_logits", name, launches[0], vocabulary % 16 == 0)
