"""The weighted sum of logits on a GPU: one launch, one read of every logit, nothing of size (B, V) written.

Mathematics (reference.py has the definition; x = sum_i w_i * logits_i over one row):

    token = argmax x,   logprob = max x - logsumexp x = -log sum_v exp(x_v - max x)

Work: a program reads one split of 4,096 entries of one row from all N members and keeps (maximum, index, sum of
exponentials, flag). The program that finishes a row last (it draws the row's last ticket) joins the splits and writes
the results, so no second launch and no host is needed; a second launch would add its own latency to the few
microseconds this takes and read the same partial results.

Bytes: N * B * V * itemsize read once; about 16 bytes a split of partial results. Floor: those bytes over the device's
copy bandwidth. `members` reads its tile a second time while it lies in cache.

The same bits for a row whatever stands around it, whatever its alignment, and whatever layout the compiler picks:
maxima and indices do not depend on order; exponentials are added in groups of four in a fixed order, then as 64-bit
integers, in which addition is exact. Products and sums are not fused, so x has the same bits as on the CPU.

    R rows of logits  B sequences (R = B * every)  V vocabulary  N members  S splits  K best  G given tokens  T drafted
    tokens
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.combine import (
    FLOAT32_MAX,
    ROW_SCALE,
    exact_sum,
    ordered_key,
    sum_of_weighted,
    sum_with_corners,
    x_at,
)
from kernels.triton.philox import gumbel, random_words
from kernels.types import EMPTY, MAX_MEMBERS, MAX_VOCABULARY, SPLIT, FusedLogits, Request, Verification

_MAX_SPLITS = tl.constexpr(MAX_VOCABULARY // SPLIT)
_EMPTY = tl.constexpr(EMPTY)
_LAST = tl.constexpr(0x7FFFFFFF)
_SUM_SCALE = tl.constexpr(2.0**50)  # a split's sum is at most 4,096 = 2**12: 62 bits


@triton.jit
def _fused_logits_kernel(
    l0, l1, l2, l3, l4, l5, l6, l7,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7,
    weights_NB, weight_stride_n, weight_stride_b,
    token_R, logprob_R, flag_R,
    member_logprob_NR, top_token_RK, top_logprob_RK, entropy_R, given_RG, given_logprob_RG,
    seed_1, row_id_R, position_R, temperature_R, sample_token_R, sample_logprob_R,
    threshold_key_R, draft_BT, accepted_B, next_token_B, next_logprob_B, next_flag_B,
    value_RFS, index_RIS, ticket_R, ticket_B,
    R, V, splits, every, given_count,
    N: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr, ENTROPY: tl.constexpr, GIVEN: tl.constexpr,
    SAMPLE: tl.constexpr, TRUNCATED: tl.constexpr, DRAFT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, split = program // splits, program % splits
    row64 = row.to(tl.int64)
    rows = (
        l0 + row64 * stride0, l1 + row64 * stride1, l2 + row64 * stride2, l3 + row64 * stride3,
        l4 + row64 * stride4, l5 + row64 * stride5, l6 + row64 * stride6, l7 + row64 * stride7,
    )  # fmt: skip
    weight_B = weights_NB + row // every * weight_stride_b
    w0 = tl.load(weight_B)
    w1 = tl.load(weight_B + (1 if N > 1 else 0) * weight_stride_n)
    w2 = tl.load(weight_B + (2 if N > 2 else 0) * weight_stride_n)
    w3 = tl.load(weight_B + (3 if N > 3 else 0) * weight_stride_n)
    w4 = tl.load(weight_B + (4 if N > 4 else 0) * weight_stride_n)
    w5 = tl.load(weight_B + (5 if N > 5 else 0) * weight_stride_n)
    w6 = tl.load(weight_B + (6 if N > 6 else 0) * weight_stride_n)
    w7 = tl.load(weight_B + (7 if N > 7 else 0) * weight_stride_n)
    weights = (w0, w1, w2, w3, w4, w5, w6, w7)

    # 1. This split: x, its maximum, index and sum of exponentials.
    start = split * SIZE
    offsets_C = start + tl.arange(0, SIZE)
    inside_C = offsets_C < V
    if start + SIZE <= V:  # without a mask the loads are 16 bytes wide wherever the row is aligned, also for odd V
        x_C = sum_of_weighted(rows, weights, offsets_C, inside_C, N, False)
    else:
        x_C = sum_of_weighted(rows, weights, offsets_C, inside_C, N, True)
    flag = 0
    if tl.max(x_C.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0) >= 0x7F800000:
        x_C, code_C = sum_with_corners(rows, weights, offsets_C, inside_C, N)
        flag = tl.max(code_C, axis=0)
    x_C = tl.where(inside_C, x_C, float("-inf"))
    peak = tl.max(x_C, axis=0)
    shifted_C = x_C - tl.maximum(peak, -FLOAT32_MAX)
    exp_C = tl.exp(shifted_C)
    # Fields of a row's partial results, one line of S splits each; what is not asked for has no line.
    FIELDS: tl.constexpr = 2 + ENTROPY + 2 * N * MEMBERS + TOP_K + SAMPLE
    INDICES: tl.constexpr = 2 + TOP_K + SAMPLE
    value_S = value_RFS + row64 * FIELDS * splits
    index_S = index_RIS + row64 * INDICES * splits
    tl.store(value_S + split, peak)
    tl.store(value_S + splits + split, exact_sum(exp_C, SIZE, _SUM_SCALE))
    tl.store(index_S + split, tl.min(tl.where(x_C == peak, offsets_C, _LAST), axis=0))
    tl.store(index_S + splits + split, flag)
    if ENTROPY:
        tl.store(value_S + 2 * splits + split, exact_sum(exp_C * tl.maximum(shifted_C, -1e4), SIZE, _SUM_SCALE))
    if MEMBERS:
        for n in tl.static_range(N):
            own_C = tl.load(rows[n] + offsets_C, mask=inside_C, other=float("-inf")).to(tl.float32)
            own_C = tl.where(tl.abs(own_C) <= FLOAT32_MAX, own_C, float("-inf"))
            own_peak = tl.max(own_C, axis=0)
            own_exp_C = tl.exp(own_C - tl.maximum(own_peak, -FLOAT32_MAX))
            tl.store(value_S + (2 + ENTROPY + 2 * n) * splits + split, own_peak)
            tl.store(value_S + (3 + ENTROPY + 2 * n) * splits + split, exact_sum(own_exp_C, SIZE, _SUM_SCALE))
    if TOP_K:
        rest_C = x_C
        for k in tl.static_range(TOP_K):
            best = tl.max(rest_C, axis=0)
            best_index = tl.min(tl.where(rest_C == best, offsets_C, _LAST), axis=0)
            rest_C = tl.where(offsets_C == best_index, float("-inf"), rest_C)
            tl.store(value_S + (2 + ENTROPY + 2 * N * MEMBERS + k) * splits + split, best)
            tl.store(index_S + (2 + k) * splits + split, best_index)
    if SAMPLE:
        words_C = random_words(tl.load(seed_1), tl.load(row_id_R + row), tl.load(position_R + row), start, SIZE)
        score_C = x_C * (1.0 / tl.load(temperature_R + row)) + gumbel(words_C)
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
        row_flag = tl.where((row_peak == float("-inf")) & (row_flag == 0), _EMPTY * 16, row_flag)
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
        if ENTROPY:
            # H = log Z - sum p (x - peak), and a split's moment was taken about its own peak
            moment_S = tl.load(value_S + 2 * splits + offsets_S, mask=inside_S, other=0.0, cache_modifier=".cg")
            about_S = (moment_S + total_S * tl.maximum(shift_S, -1e4)) * scale_S
            about = tl.sum((about_S * ROW_SCALE).to(tl.int64), axis=0).to(tl.float32) * (1.0 / ROW_SCALE)
            tl.store(entropy_R + row, log_total - about / total + nan)
        if MEMBERS:
            for n in tl.static_range(N):
                line_S = value_S + (2 + ENTROPY + 2 * n) * splits + offsets_S
                own_peak_S = tl.load(line_S, mask=inside_S, other=float("-inf"), cache_modifier=".cg")
                own_total_S = tl.load(line_S + splits, mask=inside_S, other=0.0, cache_modifier=".cg")
                own_peak = tl.max(own_peak_S, axis=0)
                own_scale_S = tl.exp(own_peak_S - tl.maximum(own_peak, -FLOAT32_MAX))
                own_total = tl.sum((own_total_S * own_scale_S * ROW_SCALE).to(tl.int64), axis=0).to(tl.float32)
                at_token = tl.load(rows[n] + tl.where(fine, token, 0)).to(tl.float32)
                own_logprob = at_token - own_peak - tl.log(own_total * (1.0 / ROW_SCALE))
                tl.store(member_logprob_NR + n * R + row, tl.where(fine, own_logprob, float("nan")))
        if GIVEN:
            offsets_G = tl.arange(0, GIVEN)
            here_G = offsets_G < given_count
            given_G = tl.load(given_RG + row64 * given_count + offsets_G, mask=here_G, other=-1)
            wanted_G = (given_G >= 0) & (given_G < V)
            x_G = x_at(rows, weights, given_G, wanted_G, N)
            value_G = tl.where(wanted_G, x_G - row_base - log_total, float("nan"))
            value_G = tl.where(fine, value_G, float("nan"))
            tl.store(given_logprob_RG + row64 * given_count + offsets_G, value_G, mask=here_G)
        if TOP_K:
            COLUMNS: tl.constexpr = 16
            offsets_K = tl.arange(0, COLUMNS)
            inside_SK = inside_S[:, None] & (offsets_K < TOP_K)[None, :]
            line_SK = offsets_K[None, :] * splits + offsets_S[:, None]
            value_line = value_S + (2 + ENTROPY + 2 * N * MEMBERS) * splits
            rest_SK = tl.load(value_line + line_SK, mask=inside_SK, other=float("-inf"), cache_modifier=".cg")
            index_SK = tl.load(index_S + 2 * splits + line_SK, mask=inside_SK, other=_LAST, cache_modifier=".cg")
            for k in tl.static_range(TOP_K):
                best = tl.max(tl.max(rest_SK, axis=1), axis=0)
                best_index = tl.min(tl.min(tl.where(rest_SK == best, index_SK, _LAST), axis=1), axis=0)
                rest_SK = tl.where(index_SK == best_index, float("-inf"), rest_SK)
                exists = fine & (best > float("-inf"))
                tl.store(top_token_RK + row64 * TOP_K + k, tl.where(exists, best_index, -1).to(tl.int64))
                tl.store(top_logprob_RK + row64 * TOP_K + k, tl.where(fine, best - row_base - log_total, float("nan")))
        if SAMPLE:
            score_S = tl.load(
                value_S + (FIELDS - 1) * splits + offsets_S, mask=inside_S, other=float("-inf"), cache_modifier=".cg"
            )
            drawn_S = tl.load(
                index_S + (INDICES - 1) * splits + offsets_S, mask=inside_S, other=_LAST, cache_modifier=".cg"
            )
            score = tl.max(score_S, axis=0)
            drawn = tl.min(tl.where(score_S == score, drawn_S, _LAST), axis=0)
            one_1 = tl.zeros((1,), tl.int32)
            x_1 = x_at(rows, weights, one_1 + tl.where(fine, drawn, 0), one_1 == 0, N)
            tl.store(sample_token_R + row, tl.where(fine, drawn, -1).to(tl.int64))
            drawn_logprob_1 = tl.where(fine, x_1 - row_base - log_total, float("nan"))
            tl.store(sample_logprob_R + row + one_1, drawn_logprob_1)

        # 3. The last row of a sequence compares its drafted tokens. A flagged row agrees with nothing.
        if DRAFT:
            batch = row // every
            tl.debug_barrier()
            done = tl.atomic_add(ticket_B + batch, 1, sem="acq_rel")
            if done == every - 1:
                tl.debug_barrier()
                tl.store(ticket_B + batch, 0)
                offsets_T = tl.arange(0, DRAFT)
                inside_T = offsets_T < every
                first = batch.to(tl.int64) * every
                chosen_T = tl.load(token_R + first + offsets_T, mask=inside_T, other=-1, cache_modifier=".cg")
                drafted = draft_BT + batch.to(tl.int64) * (every - 1) + offsets_T
                drafted_T = tl.load(drafted, mask=offsets_T < every - 1, other=-1)
                agrees_T = (chosen_T == drafted_T) & (chosen_T >= 0)
                accepted = tl.min(tl.where(agrees_T, every - 1, tl.minimum(offsets_T, every - 1)), axis=0)
                here_T = offsets_T == accepted
                tl.store(accepted_B + batch, accepted.to(tl.int64))
                tl.store(next_token_B + batch, tl.sum(tl.where(here_T, chosen_T, 0), axis=0))
                logprob_T = tl.load(logprob_R + first + offsets_T, mask=here_T, other=0.0, cache_modifier=".cg")
                flag_T = tl.load(flag_R + first + offsets_T, mask=here_T, other=0, cache_modifier=".cg")
                tl.store(next_logprob_B + batch, tl.sum(logprob_T, axis=0))
                tl.store(next_flag_B + batch, tl.sum(flag_T, axis=0))


# A split fills 8 warps with 16 entries a thread (two 16-byte loads of bf16 a member), which stays clear of spills at 8
# members of float32 (kernels.resources shows it), and a split decides the bits.
WARPS = 8
# Without fusion a product is rounded before it is added, as on the CPU; memory is what bounds this kernel, not
# arithmetic.
LAUNCH_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
# Where only the next token of few members of half precision is wanted, 64 registers are enough, and four programs share
# a multiprocessor instead of three: measured on an H200, 20 µs instead of 23 at B = 64, 64 instead of 82 at 256.
REGISTERS, MEMBERS_OF_FEW_REGISTERS, ALIGNED_ENTRIES = 64, 3, 16


def launch_options(request: Request) -> dict[str, Any]:
    results = (request.given, request.sample, request.draft)
    asked = (request.members, request.top_k, request.entropy, *(result is not None for result in results))
    few = len(request.logits) <= MEMBERS_OF_FEW_REGISTERS and all(
        logits_RV.dtype.itemsize == 2 and logits_RV.stride(0) % ALIGNED_ENTRIES == 0 for logits_RV in request.logits
    )
    if torch.version.hip or any(asked) or not few:  # AMD's compiler has no such option
        return LAUNCH_OPTIONS
    return LAUNCH_OPTIONS | {"maxnreg": REGISTERS}


def allocate(request: Request) -> FusedLogits:
    """Results and working memory of a request, for use as `out` of every later call like it."""
    rows, members, device = request.rows, len(request.logits), request.device
    splits = triton.cdiv(request.vocabulary, SPLIT)
    sample = request.sample is not None
    fields = 2 + request.entropy + 2 * members * request.members + request.top_k + sample

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def tokens(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    tickets = torch.zeros(
        rows + rows // request.every, dtype=torch.int32, device=device
    )  # each launch leaves them zero
    indices = torch.empty((rows, 2 + request.top_k + sample, splits), dtype=torch.int32, device=device)
    return FusedLogits(
        token=tokens(rows),
        logprob=floats(rows),
        flag=torch.empty(rows, dtype=torch.int32, device=device),
        member_logprob=floats(members, rows) if request.members else None,
        top_token=tokens(rows, request.top_k) if request.top_k else None,
        top_logprob=floats(rows, request.top_k) if request.top_k else None,
        entropy=floats(rows) if request.entropy else None,
        given_logprob=floats(rows, request.given.shape[1]) if request.given is not None else None,
        sample_token=tokens(rows) if sample else None,
        sample_logprob=floats(rows) if sample else None,
        workspace=(floats(rows, fields, splits), indices, tickets),
    )


def allocate_verification(request: Request) -> Verification:
    """The same for a verification."""
    steps = allocate(request)
    batch = request.rows // request.every
    return Verification(
        accepted=torch.empty(batch, dtype=torch.int64, device=request.device),
        token=torch.empty(batch, dtype=torch.int64, device=request.device),
        logprob=torch.empty(batch, dtype=torch.float32, device=request.device),
        flag=torch.empty(batch, dtype=torch.int32, device=request.device),
        steps=steps,
    )


def run(request: Request, out: FusedLogits | None = None) -> FusedLogits:
    """Every result of the request in one launch (a truncated sample is drawn by truncated_sample_triton.py instead)."""
    out = allocate(request) if out is None else out
    _launch(request, out, None)
    return out


def verify(request: Request, out: Verification | None = None) -> Verification:
    """Verification of `request.draft` in the same launch."""
    out = allocate_verification(request) if out is None else out
    _launch(request, out.steps, out)
    return out


def launch_arguments(request: Request, out: FusedLogits, verification: Verification | None) -> tuple[tuple, dict]:
    """Positional and constexpr arguments of the kernel; what is not asked for is given some pointer and never
    touched.
    """
    members = len(request.logits)
    rows = request.rows
    logits = request.logits + request.logits[:1] * (MAX_MEMBERS - members)
    values_RFS, indices_RIS, tickets, *truncation = out.workspace
    unused = out.token
    sample = request.sample
    given = request.given
    positional = (
        *logits,
        *(logits_RV.stride(0) for logits_RV in logits),
        request.weights,
        request.weights.stride(0),
        request.weights.stride(1) if request.weights.dim() == 2 else 0,
        out.token,
        out.logprob,
        out.flag,
        *(
            unused if result is None else result
            for result in (out.member_logprob, out.top_token, out.top_logprob, out.entropy, given, out.given_logprob)
        ),
        *((unused,) * 4 if sample is None else (sample.seed, sample.row_id, sample.position, sample.temperature)),
        *(unused if result is None else result for result in (out.sample_token, out.sample_logprob)),
        truncation[0] if truncation else unused,
        *(
            (unused,) * 5
            if verification is None
            else (
                request.draft,
                verification.accepted,
                verification.token,
                verification.logprob,
                verification.flag,
            )
        ),
        values_RFS,
        indices_RIS,
        tickets,
        tickets[rows:],
        rows,
        request.vocabulary,
        values_RFS.shape[2],
        request.every,
        0 if given is None else given.shape[1],
    )
    switches = {
        "N": members,
        "MEMBERS": request.members,
        "TOP_K": request.top_k,
        "ENTROPY": request.entropy,
        "GIVEN": 0 if given is None else triton.next_power_of_2(given.shape[1]),
        "SAMPLE": sample is not None,
        "TRUNCATED": sample is not None and sample.truncated,
        "DRAFT": 0 if verification is None else triton.next_power_of_2(request.every),
        "SIZE": SPLIT,
    }
    return positional, switches


def _launch(request: Request, out: FusedLogits, verification: Verification | None) -> None:
    positional, switches = launch_arguments(request, out, verification)
    programs = request.rows * out.workspace[0].shape[2]
    _fused_logits_kernel[(programs,)](*positional, **switches, **launch_options(request))
