"""The weighted sum of logits on a CPU: tiles of the vocabulary that stay in cache, whole-tensor operations inside a
tile.

Mathematics and corners are those of reference.py; the layout of the work is that of the Triton kernel: (maximum, log of
the sum of exponentials about it) per split of 4,096 entries, joined in a fixed order. A tile is as many splits as fit
the cache, so its width follows the batch while the bits of a row do not. Products are formed and added one after the
other, never as a fused multiply-add: the sum has the same bits as the Triton kernel's.

Bytes: every logit is read once from memory (`members` again from cache); a truncated sample (top-k, top-p) sorts the
rows it draws from, a few megabytes at a time.

    R rows  V vocabulary  N members  S splits  C columns of a tile  K best  G given tokens
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels import reference
from kernels.philox import gumbel, random_words
from kernels.types import EMPTY, INFINITE, NAN, RANGE, SPLIT, FusedLogits, Request, Sampling, Verification

TILE_ELEMENTS = 1 << 17  # float32 entries of one tile: half a megabyte, inside the L2 of two cores
SORTED_ELEMENTS = 1 << 18
BUNDLE = 64  # entries whose maximum stands for them in the search for the best
BUNDLES = SPLIT // BUNDLE
_FAR = -1e4  # a shift below which exp is 0; keeps 0 * -inf out of the moments


def run(request: Request) -> FusedLogits:
    """Every result of the request, in one pass over the logits."""
    rows, vocabulary, sample = request.rows, request.vocabulary, request.sample
    splits = -(-vocabulary // SPLIT)
    log_total_RS, entropy_RS, score_RS = torch.empty(3, rows, splits)
    drawn_RS = torch.empty(rows, splits, dtype=torch.int64)
    bundle_RU = torch.full((rows, splits * BUNDLES), -torch.inf)
    flag_R = torch.zeros(rows, dtype=torch.int32)
    all_fine = True
    threshold_R1 = _threshold(request, sample)[:, None] if sample is not None and sample.truncated else None
    per_tile = max(1, TILE_ELEMENTS // (rows * SPLIT)) * SPLIT
    for start in range(0, vocabulary, per_tile):
        stop = min(vocabulary, start + per_tile)
        x_RC, tile_flag_R = combined_tile(request, start, stop)
        if tile_flag_R is not None:
            flag_R, all_fine = torch.maximum(flag_R, tile_flag_R), False
        for (at, width), size in _runs(start, stop, BUNDLE):
            x_RUC = x_RC[:, at - start : at - start + width].unflatten(1, (-1, size))
            bundle_RU[:, at // BUNDLE : -(-(at + width) // BUNDLE)] = x_RUC.amax(dim=2)
        if sample is not None:
            score_RC = _scores(x_RC, sample, start, stop, threshold_R1)
        for (at, width), size in _runs(start, stop, SPLIT):
            here = slice(at // SPLIT, -(-(at + width) // SPLIT))
            # one operation that reads a split once: x - its peak - log of its sum of exponentials
            within_RSC = x_RC[:, at - start : at - start + width].unflatten(1, (-1, size)).log_softmax(dim=2)
            log_total_RS[:, here] = within_RSC.amax(dim=2).neg_()
            if request.entropy:
                entropy_RS[:, here] = within_RSC.exp().mul_(within_RSC.clamp_min_(_FAR)).sum(dim=2).neg_()
            if sample is not None:
                score_RSC = score_RC[:, at - start : at - start + width].unflatten(1, (-1, size))
                score_RS[:, here], index_RS = score_RSC.max(dim=2)
                drawn_RS[:, here] = index_RS + torch.arange(at, at + width, size)

    peak_RS = bundle_RU.view(rows, splits, BUNDLES).amax(dim=2)
    peak_R = peak_RS.amax(dim=1)
    if not all_fine:
        flag_R = torch.where((peak_R == -torch.inf) & (flag_R == 0), EMPTY * 16, flag_R)
        peak_R = torch.where(flag_R == 0, peak_R, 0.0)
        for within_RS in (log_total_RS, entropy_RS):  # of a split whose tokens are all masked
            within_RS.masked_fill_(peak_RS == -torch.inf, 0.0)
    fine_R = flag_R == 0
    nan_R = torch.where(fine_R, 0.0, torch.nan)
    log_share_RS = log_total_RS.add_(peak_RS - peak_R[:, None])  # in this order the largest split's stays as it is
    share_RS = log_share_RS.exp()
    total_R = share_RS.sum(dim=1)
    log_total_R = total_R.log()
    token_R = _first_at_peak(request, bundle_RU, peak_R)

    def logprob_at(token_RG: Tensor) -> Tensor:
        return combined_at(request, token_RG) - peak_R[:, None] - log_total_R[:, None] + nan_R[:, None]

    result = FusedLogits(token=torch.where(fine_R, token_R, -1), logprob=nan_R - log_total_R, flag=flag_R)
    if request.entropy:
        # entropy of the choice of a split, and the mean of those within the splits
        about_RS = (entropy_RS - log_share_RS.clamp_min(_FAR)) * share_RS
        result = replace(result, entropy=log_total_R + about_RS.sum(dim=1) / total_R + nan_R)
    if request.members:
        own = [_own_logprob(logits_RV, token_R) for logits_RV in request.logits]
        result = replace(result, member_logprob=torch.stack(own) + nan_R)
    if request.given is not None:
        inside_RG = (request.given >= 0) & (request.given < vocabulary)
        value_RG = logprob_at(torch.where(inside_RG, request.given, 0))
        result = replace(result, given_logprob=torch.where(inside_RG, value_RG, torch.nan))
    if request.top_k:
        best_RK = _best(request, bundle_RU)
        best_logprob_RK = logprob_at(best_RK)
        exists_RK = best_logprob_RK > -torch.inf  # false for NaN too
        result = replace(result, top_token=torch.where(exists_RK, best_RK, -1), top_logprob=best_logprob_RK)
    if sample is not None:
        split_R1 = score_RS.max(dim=1, keepdim=True).indices
        drawn_R1 = torch.where(fine_R[:, None], drawn_RS.gather(1, split_R1), 0)
        drawn_R = torch.where(fine_R, drawn_R1[:, 0], -1)
        result = replace(result, sample_token=drawn_R, sample_logprob=logprob_at(drawn_R1)[:, 0])
    return result


def verify(request: Request) -> Verification:
    """Verification of `request.draft`."""
    return reference.accept(request, run(request))


def combined_tile(request: Request, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """x_RC for columns start .. stop, -inf where masked, and the rows' flags, None if there is nothing unusual."""
    parts = [logits_RV[:, start:stop] for logits_RV in request.logits]
    weights_NR = request.weights_NR()
    x_RC = _sum(parts, weights_NR)
    if math.isfinite(x_RC.sum()):  # infinities and NaN stay in it; finite numbers that overflow it only cost time
        return x_RC, None
    return _with_corners(parts, weights_NR)


def combined_at(request: Request, token_RG: Tensor) -> Tensor:
    """x at the given columns, -inf where masked."""
    return _with_corners([logits_RV.gather(1, token_RG) for logits_RV in request.logits], request.weights_NR())[0]


def _sum(parts: list[Tensor], weights_NR: Tensor) -> Tensor:
    """The sum before any corner is looked at."""
    first_R1, *others_R1 = weights_NR[:, :, None].unbind()
    x_RC = parts[0] * first_R1
    for part_RC, weights_R1 in zip(parts[1:], others_R1, strict=True):
        x_RC += part_RC * weights_R1
    return x_RC


def _with_corners(parts: list[Tensor], weights_NR: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with masks and flags: the slow way, for a tile that holds something not finite."""
    masked_RC = torch.zeros(parts[0].shape, dtype=torch.bool)
    for part_RC in parts:
        masked_RC |= part_RC == -torch.inf
    x_RC = torch.zeros(parts[0].shape)
    flag_R = torch.zeros(parts[0].shape[0], dtype=torch.int32)
    wrong_RC = torch.zeros_like(masked_RC)
    left_RC = masked_RC.clone()
    for number, part_RC in enumerate(parts):
        product_RC = part_RC * weights_NR[number][:, None]
        x_RC = product_RC if number == 0 else x_RC + product_RC
        beyond_RC = ~(product_RC.isfinite() & x_RC.isfinite()) & ~left_RC
        left_RC |= beyond_RC
        for here_RC, kind in ((beyond_RC, RANGE), (part_RC == torch.inf, INFINITE), (part_RC.isnan(), NAN)):
            flag_R = torch.where(here_RC.any(dim=1), flag_R.clamp_min(kind * 16 + number + 1), flag_R)
            wrong_RC |= here_RC
    return torch.where(masked_RC | wrong_RC, -torch.inf, x_RC), flag_R


def _runs(start: int, stop: int, size: int) -> list[tuple[tuple[int, int], int]]:
    """A tile as ((start, width), piece): all whole pieces of `size` together, then the last, shorter one."""
    whole = (stop - start) // size * size
    rest = stop - start - whole
    return [((at, width), piece) for at, width, piece in ((start, whole, size), (start + whole, rest, rest)) if width]


def _first_at_peak(request: Request, bundle_RU: Tensor, peak_R: Tensor) -> Tensor:
    """The lowest index whose sum equals the peak: looked up again in the first bundle that reaches it."""
    first_R1 = (bundle_RU == peak_R[:, None]).view(torch.uint8).argmax(dim=1, keepdim=True) * BUNDLE
    column_RC = (first_R1 + torch.arange(BUNDLE)).clamp_max_(request.vocabulary - 1)  # the last one again does no harm
    # a masked entry needs no care here: its sum is infinite or NaN, and the peak is finite
    x_RC = _sum([logits_RV.gather(1, column_RC) for logits_RV in request.logits], request.weights_NR())
    return first_R1[:, 0] + (x_RC == peak_R[:, None]).view(torch.uint8).argmax(dim=1)


def _own_logprob(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """log_softmax of one member at one token, its sums formed split by split as those of the combined logits."""
    alone = run(Request(logits=(logits_RV,), weights=torch.ones(1), given=token_R[:, None]))
    assert alone.given_logprob is not None
    return alone.given_logprob[:, 0]


def _ordered_key(x: Tensor, index: Tensor) -> Tensor:
    """int64 keys whose order is (x ascending, index descending); -0.0 counts as 0.0."""
    bits = (x + 0.0).view(torch.int32).to(torch.int64)
    return (torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) << 20) - index


def _best(request: Request, bundle_RU: Tensor) -> Tensor:
    """The k best tokens: they lie in the k bundles with the largest maxima, the lower bundle first on ties."""
    count = min(request.top_k, bundle_RU.shape[1])
    key_RU = _ordered_key(bundle_RU, torch.arange(bundle_RU.shape[1]))
    chosen_RK = key_RU.topk(count, dim=1).indices
    column_RC = (chosen_RK[:, :, None] * BUNDLE + torch.arange(BUNDLE)).flatten(1)
    inside_RC = column_RC < request.vocabulary
    x_RC = combined_at(request, torch.where(inside_RC, column_RC, 0)).masked_fill_(~inside_RC, -torch.inf)
    return column_RC.gather(1, _ordered_key(x_RC, column_RC).topk(request.top_k, dim=1).indices)


def _scores(x_RC: Tensor, sample: Sampling, start: int, stop: int, threshold_R1: Tensor | None) -> Tensor:
    """x at the temperature plus noise, -inf where a token cannot be drawn: the largest score is the draw."""
    assert isinstance(sample.temperature, Tensor)  # check_sampling made it one
    noise_RC = gumbel(random_words(int(sample.seed), sample.row_id, sample.position, start, stop))
    score_RC = x_RC * sample.temperature.reciprocal()[:, None] + noise_RC
    return score_RC if threshold_R1 is None else score_RC.masked_fill_(x_RC < threshold_R1, -torch.inf)


def _threshold(request: Request, sample: Sampling) -> Tensor:
    """The smallest x that top-k and top-p keep, by sorting as many rows at once as make up a few megabytes."""
    assert isinstance(sample.temperature, Tensor)
    threshold_R = torch.empty(request.rows)
    weights_NR = request.weights_NR()
    block = max(1, SORTED_ELEMENTS // request.vocabulary)
    for first in range(0, request.rows, block):
        here = slice(first, first + block)
        part = Request(tuple(logits_RV[here] for logits_RV in request.logits), weights_NR[:, here].contiguous())
        x_RV, _ = combined_tile(part, 0, request.vocabulary)
        threshold_R[here] = reference.threshold(x_RV, sample.temperature[here], sample)
    return threshold_R
