"""The weighted sum of logits on a CPU: tiles of the vocabulary that stay in cache, whole-tensor operations inside a tile.

Mathematics and corners are those of reference.py; the layout of the work is that of the Triton kernel: one running
(maximum, sum of exponentials) per split of 4,096 entries, joined in a fixed order. A tile is as many splits as fit the cache, so
its width follows the batch while the bits of a row do not. The products are formed and added one after the other, never
as a fused multiply-add: the sum has the same bits as the Triton kernel's.

    R rows  V vocabulary  N members  S splits  C columns of a tile
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.request import EMPTY, INFINITE, NAN, RANGE, SPLIT, FusedLogits, Request

TILE_ELEMENTS = 1 << 17  # float32 entries of one tile: half a megabyte, inside the L2 of two cores


def run(request: Request) -> FusedLogits:
    """Every result of the request, in one pass over the logits."""
    rows, vocabulary = request.rows, request.vocabulary
    splits = -(-vocabulary // SPLIT)
    peak_RS = torch.empty(rows, splits)
    total_RS = torch.empty(rows, splits)
    moment_RS = torch.empty(rows, splits) if request.entropy else None
    flag_R = torch.zeros(rows, dtype=torch.int32)
    per_tile = max(1, TILE_ELEMENTS // (rows * SPLIT)) * SPLIT
    for start in range(0, vocabulary, per_tile):
        stop = min(vocabulary, start + per_tile)
        x_RC, tile_flag_R = combined_tile(request, start, stop)
        if tile_flag_R is not None:
            flag_R = torch.maximum(flag_R, tile_flag_R)
        for at, width in _runs(start, stop):
            x_RSC = x_RC[:, at - start : at - start + width].unflatten(1, (-1, min(width, SPLIT)))
            where = slice(at // SPLIT, -(-(at + width) // SPLIT))
            peak_RS[:, where] = x_RSC.amax(dim=2)
            base_RS = peak_RS[:, where].clamp_min(torch.finfo(torch.float32).min)
            shifted_RSC = x_RSC - base_RS[:, :, None]
            exp_RSC = shifted_RSC.exp()
            total_RS[:, where] = exp_RSC.sum(dim=2)
            if moment_RS is not None:
                moment_RS[:, where] = exp_RSC.mul_(shifted_RSC.clamp_min_(-1e4)).sum(dim=2)
    peak_R = peak_RS.amax(dim=1)
    flag_R = torch.where((peak_R == -torch.inf) & (flag_R == 0), EMPTY * 16, flag_R)
    fine_R = flag_R == 0
    peak_R = torch.where(fine_R, peak_R, 0.0)
    shift_RS = torch.where(fine_R[:, None], peak_RS, 0.0) - peak_R[:, None]
    scale_RS = shift_RS.exp()
    total_R = (total_RS * scale_RS).sum(dim=1)
    log_total_R = total_R.log()
    token_R = _first_at_peak(request, peak_RS, peak_R)
    nan_R = torch.where(fine_R, 0.0, torch.nan)

    entropy_R = member_logprob_NR = given_logprob_RG = None
    if moment_RS is not None:
        # H = log Z - sum p (x - peak), and a split's moment was taken about its own peak
        about_RS = (moment_RS + total_RS * shift_RS.clamp_min(-1e4)) * scale_RS
        entropy_R = log_total_R - about_RS.sum(dim=1) / total_R + nan_R
    if request.members:
        member_logprob_NR = torch.stack([_own_logprob(logits_RV, token_R) for logits_RV in request.logits]) + nan_R
    if request.given is not None:
        inside_RG = (request.given >= 0) & (request.given < vocabulary)
        x_RG = combined_at(request, torch.where(inside_RG, request.given, 0))
        values_RG = x_RG - peak_R[:, None] - log_total_R[:, None]
        given_logprob_RG = torch.where(inside_RG, values_RG, torch.nan) + nan_R[:, None]
    return FusedLogits(
        token=torch.where(fine_R, token_R, -1),
        logprob=nan_R - log_total_R,
        flag=flag_R,
        entropy=entropy_R,
        member_logprob=member_logprob_NR,
        given_logprob=given_logprob_RG,
    )


def combined_tile(request: Request, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """x_RC for columns start .. stop, -inf where masked, and the rows' flags, None if there is nothing unusual."""
    x_RC = _sum([logits_RV[:, start:stop] for logits_RV in request.logits], request)
    # amax and amin carry NaN, so two passes over the tile in cache see everything that is not finite
    if torch.isfinite(x_RC.amax() - x_RC.amin().clamp_max(0) * 0) and x_RC.amin() > -torch.inf:
        return x_RC, None
    return _careful([logits_RV[:, start:stop] for logits_RV in request.logits], request)


def combined_at(request: Request, token_RG: Tensor) -> Tensor:
    """x at the given columns, -inf where masked."""
    return _careful([logits_RV.gather(1, token_RG) for logits_RV in request.logits], request)[0]


def _sum(parts: list[Tensor], request: Request) -> Tensor:
    weights_NR = request.weights_NR()
    x_RC = parts[0] * weights_NR[0][:, None]
    for part_RC, weights_R in zip(parts[1:], weights_NR[1:], strict=True):
        x_RC += part_RC * weights_R[:, None]
    return x_RC


def _careful(parts: list[Tensor], request: Request) -> tuple[Tensor, Tensor]:
    """The sum with masks and flags: the slow way, taken only by a tile that holds something not finite."""
    weights_NR = request.weights_NR()
    masked_RC = torch.zeros(parts[0].shape, dtype=torch.bool)
    for part_RC in parts:
        masked_RC |= part_RC == -torch.inf
    x_RC = torch.zeros(parts[0].shape)
    flag_R = torch.zeros(parts[0].shape[0], dtype=torch.int32)
    blamed_RC = masked_RC.clone()
    for number, part_RC in enumerate(parts):
        product_RC = part_RC * weights_NR[number][:, None]
        x_RC = product_RC if number == 0 else x_RC + product_RC
        beyond_RC = ~(product_RC.isfinite() & x_RC.isfinite()) & ~blamed_RC
        blamed_RC |= beyond_RC
        for wrong_RC, kind in ((beyond_RC, RANGE), (part_RC == torch.inf, INFINITE), (part_RC.isnan(), NAN)):
            code = kind * 16 + number + 1
            flag_R = torch.where(wrong_RC.any(dim=1), flag_R.clamp_min(code), flag_R)
    return torch.where(masked_RC, -torch.inf, x_RC), flag_R


def _runs(start: int, stop: int) -> list[tuple[int, int]]:
    """The whole splits of a tile together, then the last, shorter one."""
    whole = (stop - start) // SPLIT * SPLIT
    return [(at, width) for at, width in ((start, whole), (start + whole, stop - start - whole)) if width]


def _first_at_peak(request: Request, peak_RS: Tensor, peak_R: Tensor) -> Tensor:
    """The lowest index whose sum equals the peak: looked up again in the first split that reaches it."""
    split_R = (peak_RS == peak_R[:, None]).to(torch.uint8).argmax(dim=1)
    column_RC = split_R[:, None] * SPLIT + torch.arange(min(SPLIT, request.vocabulary))
    inside_RC = column_RC < request.vocabulary
    x_RC = combined_at(request, torch.where(inside_RC, column_RC, 0))
    here_RC = (x_RC == peak_R[:, None]) & inside_RC
    return split_R * SPLIT + here_RC.to(torch.uint8).argmax(dim=1)


def _own_logprob(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """log_softmax of one member at one token, its sums formed split by split."""
    alone = Request(logits=(logits_RV,), weights=torch.ones(1), given=token_R[:, None])
    own = run(alone)
    assert own.given_logprob is not None
    return own.given_logprob[:, 0]
