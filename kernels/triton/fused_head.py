"""Output layers of all members, their weighted sum, log-softmax and argmax in one launch: no logits in memory.

    x = sum_i w_i h_i W_iᵀ,   token = argmax x,   logprob = max x - logsumexp x

One accumulator serves all members: before member i is added, the sum so far is multiplied by w_(i-1) / w_i, and the
whole by w_N in the end (Horner's scheme), so hidden states keep their dtype and a weight of any size costs no precision
of theirs.

Work: a program holds a tile of 64 rows x 128 entries, runs over the widths of all members, and keeps (maximum, index,
sum of exponentials, flag) of its tile; the last program of a block of rows joins them. Bytes: the weights once for up
to 64 rows (above, again from L2 where it holds them: programs that share a tile of weights run next to each other)
against, unfused, the weights once and N * R * V logits written and read. Floor: the larger of those bytes over the
bandwidth and 2 R V sum_i D_i over the arithmetic.

One tile shape for every number of rows: a row's bits do not depend on the others.

    R rows  D width  V vocabulary  N members  P tiles along V  G given tokens
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from kernels.types import MAX_MEMBERS, FusedHead, HeadRequest

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_LAST = tl.constexpr(0x7FFFFFFF)
_EMPTY, _RANGE, _NAN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _wrong(x_RV, n):
    """Flag code of each row after member n, 0 while the row is finite."""
    code_RV = tl.where(x_RV != x_RV, _NAN * 16 + n + 1, _RANGE * 16 + n + 1)
    return tl.max(tl.where(tl.abs(x_RV) <= _FLOAT32_MAX, 0, code_RV), axis=1)


@triton.jit
def _fused_head_kernel(
    h0, h1, h2, h3, h4, h5, h6, h7,
    o0, o1, o2, o3, o4, o5, o6, o7,
    h_stride0, h_stride1, h_stride2, h_stride3, h_stride4, h_stride5, h_stride6, h_stride7,
    o_stride0, o_stride1, o_stride2, o_stride3, o_stride4, o_stride5, o_stride6, o_stride7,
    d0, d1, d2, d3, d4, d5, d6, d7,
    weights_NR, weight_stride_n, weight_stride_r,
    token_R, logprob_R, flag_R, given_RG, given_logprob_RG,
    value_2RP, index_2RP, x_RG, ticket,
    R, V, tiles, row_blocks, given_count,
    N: tl.constexpr, GIVEN: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share the tile of weights and differ in the rows
    program = tl.program_id(0)
    tile, block = program // row_blocks, program % row_blocks
    hidden = (h0, h1, h2, h3, h4, h5, h6, h7)
    output = (o0, o1, o2, o3, o4, o5, o6, o7)
    hidden_stride = (h_stride0, h_stride1, h_stride2, h_stride3, h_stride4, h_stride5, h_stride6, h_stride7)
    output_stride = (o_stride0, o_stride1, o_stride2, o_stride3, o_stride4, o_stride5, o_stride6, o_stride7)
    width = (d0, d1, d2, d3, d4, d5, d6, d7)
    offsets_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offsets_D = tl.arange(0, BLOCK_D)
    # rows and entries past the end read the last one: no mask in the loop, and nothing of theirs is stored
    row_R = tl.minimum(offsets_R, R - 1).to(tl.int64)
    entry_V = tl.minimum(offsets_V, V - 1).to(tl.int64)
    x_RV = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    before_R = tl.full((BLOCK_R,), 1.0, tl.float32)
    code_R = tl.zeros((BLOCK_R,), tl.int32)
    for n in tl.static_range(N):
        weight_R = tl.load(weights_NR + n * weight_stride_n + row_R * weight_stride_r)
        if n > 0:
            x_RV = x_RV * (before_R / weight_R)[:, None]
        before_R = weight_R
        hidden_RD = hidden[n] + row_R[:, None] * hidden_stride[n] + offsets_D[None, :]
        output_VD = output[n] + entry_V[:, None] * output_stride[n] + offsets_D[None, :]
        for at in range(0, width[n], BLOCK_D):
            if EVEN:
                a_RD = tl.load(hidden_RD + at)
                b_VD = tl.load(output_VD + at)
            else:
                inside_D = (at + offsets_D < width[n])[None, :]
                a_RD = tl.load(hidden_RD + at, mask=inside_D, other=0.0)
                b_VD = tl.load(output_VD + at, mask=inside_D, other=0.0)
            if EXACT:
                x_RV = tl.dot(a_RD.to(tl.float32), b_VD.to(tl.float32).T, x_RV, input_precision="ieee")
            else:
                x_RV = tl.dot(a_RD, b_VD.T, x_RV)
        code_R = tl.where(code_R > 0, code_R, _wrong(x_RV, n))
    x_RV = x_RV * before_R[:, None]
    code_R = tl.where(code_R > 0, code_R, _wrong(x_RV, N - 1))
    x_RV = tl.where((tl.abs(x_RV) <= _FLOAT32_MAX) & (offsets_V < V)[None, :], x_RV, float("-inf"))

    inside_R = offsets_R < R
    peak_R = tl.max(x_RV, axis=1)
    index_R = tl.min(tl.where(x_RV == peak_R[:, None], offsets_V[None, :], _LAST), axis=1)
    total_R = tl.sum(tl.exp(x_RV - tl.maximum(peak_R, -_FLOAT32_MAX)[:, None]), axis=1)
    tl.store(value_2RP + row_R * tiles + tile, peak_R, mask=inside_R)
    tl.store(value_2RP + (R + row_R) * tiles + tile, total_R, mask=inside_R)
    tl.store(index_2RP + row_R * tiles + tile, index_R, mask=inside_R)
    tl.store(index_2RP + (R + row_R) * tiles + tile, code_R, mask=inside_R)
    for g in tl.static_range(GIVEN):
        given_R = tl.load(given_RG + row_R * given_count + g)
        hit_RV = offsets_V[None, :] == given_R[:, None]
        at_R = tl.max(tl.where(hit_RV, x_RV, float("-inf")), axis=1)
        mine_R = inside_R & (given_R // BLOCK_V == tile) & (given_R >= 0) & (given_R < V)
        tl.store(x_RG + row_R * given_count + g, at_R, mask=mine_R)

    # the last program of this block of rows joins its tiles; see fused_logits_triton.py for the order of memory
    tl.debug_barrier()
    if tl.atomic_add(ticket + block, 1, sem="acq_rel") == tiles - 1:
        tl.debug_barrier()
        tl.store(ticket + block, 0)
        row_peak_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        token_out_R = tl.full((BLOCK_R,), _LAST, tl.int32)
        row_flag_R = tl.zeros((BLOCK_R,), tl.int32)
        for at in range(0, tiles):
            peak_R = tl.load(value_2RP + row_R * tiles + at, cache_modifier=".cg")
            index_R = tl.load(index_2RP + row_R * tiles + at, cache_modifier=".cg")
            flag_of_tile_R = tl.load(index_2RP + (R + row_R) * tiles + at, cache_modifier=".cg")
            token_out_R = tl.where(peak_R > row_peak_R, index_R, token_out_R)
            row_peak_R = tl.maximum(row_peak_R, peak_R)
            row_flag_R = tl.maximum(row_flag_R, flag_of_tile_R)
        base_R = tl.maximum(row_peak_R, -_FLOAT32_MAX)
        sum_R = tl.zeros((BLOCK_R,), tl.float32)
        for at in range(0, tiles):
            peak_R = tl.load(value_2RP + row_R * tiles + at, cache_modifier=".cg")
            total_R = tl.load(value_2RP + (R + row_R) * tiles + at, cache_modifier=".cg")
            sum_R += total_R * tl.exp(peak_R - base_R)
        row_flag_R = tl.where((row_peak_R == float("-inf")) & (row_flag_R == 0), _EMPTY * 16, row_flag_R)
        fine_R = row_flag_R == 0
        nan_R = tl.where(fine_R, 0.0, float("nan"))
        log_R = tl.log(sum_R)
        tl.store(token_R + row_R, tl.where(fine_R, token_out_R, -1).to(tl.int64), mask=inside_R)
        tl.store(logprob_R + row_R, nan_R - log_R, mask=inside_R)
        tl.store(flag_R + row_R, row_flag_R, mask=inside_R)
        for g in tl.static_range(GIVEN):
            given_R = tl.load(given_RG + row_R * given_count + g)
            at_R = tl.load(x_RG + row_R * given_count + g, cache_modifier=".cg")
            known_R = (given_R >= 0) & (given_R < V)
            value_R = tl.where(known_R, at_R - base_R - log_R, float("nan")) + nan_R
            tl.store(given_logprob_RG + row_R * given_count + g, value_R, mask=inside_R)


# The only configuration, since a row's bits must not depend on the number of rows: 64 rows cover a decoding batch with
# one reading of the weights, and three stages of (64 + 128) x 64 half-precision entries are 72 KB of shared memory.
# float32 halves the width of a stage.
BLOCK_R, BLOCK_V = 64, 128
LAUNCH_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def block_width(request: HeadRequest) -> int:
    """Entries of D that one step of the loop reads."""
    return 32 if any(hidden_RD.dtype == torch.float32 for hidden_RD in request.hidden) else 64


def allocate(request: HeadRequest) -> FusedHead:
    """Results and working memory of a request, for use as `out` of every later call like it."""
    rows, device = request.rows, request.device
    tiles = triton.cdiv(request.vocabulary, BLOCK_V)
    given = request.given
    values_2RP = torch.empty((2, rows, tiles), dtype=torch.float32, device=device)
    indices_2RP = torch.empty((2, rows, tiles), dtype=torch.int32, device=device)
    x_RG = values_2RP if given is None else torch.empty(given.shape, dtype=torch.float32, device=device)
    tickets = torch.zeros(triton.cdiv(rows, BLOCK_R), dtype=torch.int32, device=device)
    return FusedHead(
        token=torch.empty(rows, dtype=torch.int64, device=device),
        logprob=torch.empty(rows, dtype=torch.float32, device=device),
        flag=torch.empty(rows, dtype=torch.int32, device=device),
        given_logprob=None if given is None else torch.empty_like(x_RG),
        workspace=(values_2RP, indices_2RP, x_RG, tickets),
    )


def launch_arguments(request: HeadRequest, out: FusedHead) -> tuple[tuple, dict]:
    """Positional and constexpr arguments of the kernel."""
    members, given, weights = len(request.hidden), request.given, request.weights
    padding = MAX_MEMBERS - members
    hidden = tuple(h_RD if h_RD.stride(1) == 1 else h_RD.contiguous() for h_RD in request.hidden)
    output = tuple(o_VD if o_VD.stride(1) == 1 else o_VD.contiguous() for o_VD in request.output)
    hidden, output = hidden + hidden[:1] * padding, output + output[:1] * padding
    widths = [h_RD.shape[1] for h_RD in hidden]
    values_2RP, indices_2RP, x_RG, tickets = out.workspace
    positional = (
        *hidden,
        *output,
        *(h_RD.stride(0) for h_RD in hidden),
        *(o_VD.stride(0) for o_VD in output),
        *widths,
        weights,
        weights.stride(0),
        weights.stride(1) if weights.dim() == 2 else 0,
        out.token,
        out.logprob,
        out.flag,
        out.token if given is None else given,
        out.logprob if out.given_logprob is None else out.given_logprob,
        values_2RP,
        indices_2RP,
        x_RG,
        tickets,
        request.rows,
        request.vocabulary,
        values_2RP.shape[2],
        tickets.shape[0],
        0 if given is None else given.shape[1],
    )
    block_d = block_width(request)
    # the interpreter multiplies bf16 as if it were integers; products of bf16 are exact in float32, so nothing else
    # changes
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    switches = {
        "N": members,
        "GIVEN": 0 if given is None else given.shape[1],
        "EVEN": all(width % block_d == 0 for width in widths),
        "EXACT": interpreted or any(h_RD.dtype == torch.float32 for h_RD in hidden),
        "BLOCK_R": BLOCK_R,
        "BLOCK_V": BLOCK_V,
        "BLOCK_D": block_d,
    }
    return positional, switches


def run(request: HeadRequest, out: FusedHead | None = None) -> FusedHead:
    """Every result of the request in one launch; moments are fused_head_chunked.py's."""
    out = allocate(request) if out is None else out
    positional, switches = launch_arguments(request, out)
    programs = out.workspace[0].shape[2] * out.workspace[3].shape[0]
    _fused_head_kernel[(programs,)](*positional, **switches, **LAUNCH_OPTIONS)
    return out
