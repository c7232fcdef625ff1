"""The weighted sum of logits on a CPU: tiles of the vocabulary in cache, whole-tensor operations inside a tile.

As in the Triton kernel (maximum, log of the sum of exponentials about it) are kept for each split of 4,096 entries and
joined in a fixed order: a row's bits do not depend on the width of a tile, which follows the batch. The sum has the
Triton kernel's bits: no fused multiply-add.

Bytes: every logit once (`members` again from cache); a truncated sample sorts its rows, a few megabytes at a time.

    R rows (the batch)  I rows that are sampled  V vocabulary  N members  S splits  C columns of a tile
    U bundles  K best  G target tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels import reference
from kernels.philox import gumbel, random_words
from kernels.types import ALL_MASKED, INFINITE, NAN, OVERFLOW, SPLIT, FusedLogits, Request, SamplingTensors

TILE_ELEMENTS = 1 << 17  # float32 entries of one tile: half a megabyte, inside the L2 of two cores
SORTED_ELEMENTS = 1 << 18
BUNDLE = 64  # entries whose maximum stands for them in the search for the best


def run(request: Request) -> FusedLogits:
    """Every result of the request, reading the logits once."""
    rows, vocabulary = request.batch, request.vocabulary
    splits = -(-vocabulary // SPLIT)
    log_total_RS = torch.empty(rows, splits)
    bundle_RU = torch.full((rows, splits * SPLIT // BUNDLE), -torch.inf)
    flag_R, all_fine = torch.zeros(rows, dtype=torch.int32), True
    sampler = None if request.sample is None else _Sampler(request, request.sample, splits)
    per_tile = max(1, TILE_ELEMENTS // (rows * SPLIT)) * SPLIT
    for start in range(0, vocabulary, per_tile):
        stop = min(vocabulary, start + per_tile)
        x_RC, tile_flag_R = combined_tile(request, start, stop)
        if tile_flag_R is not None:
            flag_R, all_fine = torch.maximum(flag_R, tile_flag_R), False
        for bundles, x_RUC in _pieces(x_RC, start, BUNDLE):
            bundle_RU[:, bundles] = x_RUC.amax(dim=2)
        if sampler is not None:
            sampler.add(x_RC, start, stop)
        for here, x_RSC in _pieces(x_RC, start, SPLIT):
            # one operation that reads a split once: x - its peak - log of its sum of exponentials
            log_total_RS[:, here] = x_RSC.log_softmax(dim=2).amax(dim=2).neg_()

    peak_RS = bundle_RU.view(rows, splits, -1).amax(dim=2)
    peak_R = peak_RS.amax(dim=1)
    if not all_fine:
        flag_R = torch.where((peak_R == -torch.inf) & (flag_R == 0), ALL_MASKED * 16, flag_R)
        peak_R = torch.where(flag_R == 0, peak_R, 0.0)
    fine_R = flag_R == 0
    nan_R = torch.where(fine_R, 0.0, torch.nan)
    log_total_R = _joined(log_total_RS, peak_RS, peak_R)
    token_R = _first_at_peak(request, bundle_RU, peak_R)

    def logprob_at(token_RG: Tensor) -> Tensor:
        return combined_at(request, token_RG) - peak_R[:, None] - log_total_R[:, None] + nan_R[:, None]

    result = FusedLogits(token=torch.where(fine_R, token_R, -1), logprob=nan_R - log_total_R, flag=flag_R)
    if request.targets is not None:
        inside_RG = (request.targets >= 0) & (request.targets < vocabulary)
        value_RG = logprob_at(torch.where(inside_RG, request.targets, 0))
        result = replace(result, target_logprob=torch.where(inside_RG, value_RG, torch.nan))
    if request.top_k:
        best_RK = _best(request, bundle_RU)
        best_logprob_RK = logprob_at(best_RK)
        exists_RK = best_logprob_RK > -torch.inf  # false for NaN too
        result = replace(result, top_token=torch.where(exists_RK, best_RK, -1), top_logprob=best_logprob_RK)
    if sampler is not None:
        token_R = torch.where(fine_R, sampler.token(token_R), 0)
        logprob_R = torch.where(sampler.greedy_R, result.logprob, logprob_at(token_R[:, None])[:, 0])
        result = replace(result, sample_token=torch.where(fine_R, token_R, -1), sample_logprob=logprob_R)
    if request.members:
        own_NRG = _own_logprobs(request, token_R) + nan_R[:, None]
        targets = own_NRG[:, :, 1:] if request.targets is not None else None
        result = replace(result, member_logprob=own_NRG[:, :, 0], member_target_logprob=targets)
    return result


def combined_tile(request: Request, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """x_RC for columns start .. stop, -inf where masked, and the rows' flags, None if there is nothing unusual."""
    parts = _zero_where_left_out(request, [logits_RV[:, start:stop] for logits_RV in request.logits])
    return _quick_sum(parts, request.weights_NB)


def combined_at(request: Request, token_RG: Tensor) -> Tensor:
    """x at the given columns, -inf where masked."""
    return _quick_sum(_columns(request, token_RG), request.weights_NB)[0]


def _columns(request: Request, token_RG: Tensor) -> list[Tensor]:
    return _zero_where_left_out(request, [logits_RV.gather(1, token_RG) for logits_RV in request.logits])


def _zero_where_left_out(request: Request, parts: list[Tensor]) -> list[Tensor]:
    if (left_out_NR := request.left_out_NB) is None:
        return parts
    return [part_RC.masked_fill(out_R[:, None], 0.0) for part_RC, out_R in zip(parts, left_out_NR, strict=True)]


def weighted_sum(parts: list[Tensor], weights_NR: Tensor) -> Tensor:
    """The sum, no corner case looked at."""
    first_R1, *others_R1 = weights_NR[:, :, None].unbind()
    x_RC = parts[0] * first_R1
    for part_RC, weights_R1 in zip(parts[1:], others_R1, strict=True):
        x_RC += part_RC * weights_R1
    return x_RC


def _quick_sum(parts: list[Tensor], weights_NR: Tensor) -> tuple[Tensor, Tensor | None]:
    """The sum, -inf where masked, and the rows' flags, None if there is nothing unusual."""
    x_RC = weighted_sum(parts, weights_NR)
    if math.isfinite(x_RC.sum()):  # infinities and NaN stay in it; finite numbers that overflow it only cost time
        return x_RC, None
    return checked_sum(parts, weights_NR)


def checked_sum(parts: list[Tensor], weights_NR: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with masks and flags: the slow way, for a tile that holds something not finite."""
    masked_RC = torch.zeros_like(parts[0], dtype=torch.bool)
    for part_RC in parts:
        masked_RC |= part_RC == -torch.inf
    x_RC = torch.zeros_like(parts[0], dtype=torch.float32)
    flag_R = torch.zeros(len(x_RC), dtype=torch.int32, device=x_RC.device)
    wrong_RC = torch.zeros_like(masked_RC)
    settled_RC = masked_RC.clone()
    for number, part_RC in enumerate(parts):
        product_RC = part_RC * weights_NR[number][:, None]
        x_RC = product_RC if number == 0 else x_RC + product_RC
        beyond_RC = ~(product_RC.isfinite() & x_RC.isfinite()) & ~settled_RC
        settled_RC |= beyond_RC
        for here_RC, kind in ((beyond_RC, OVERFLOW), (part_RC == torch.inf, INFINITE), (part_RC.isnan(), NAN)):
            flag_R = torch.where(here_RC.any(dim=1), flag_R.clamp_min(kind * 16 + number + 1), flag_R)
            wrong_RC |= here_RC
    return torch.where(masked_RC | wrong_RC, -torch.inf, x_RC), flag_R


def _pieces(x_RC: Tensor, start: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The pieces of a tile and their numbers: all whole ones together, (R, pieces, size), then a last, shorter one."""
    width, first = x_RC.shape[1], start // size
    last, whole = first + width // size, width // size * size
    if whole:
        yield slice(first, last), x_RC[:, :whole].unflatten(1, (-1, size))
    if whole < width:
        yield slice(last, last + 1), x_RC[:, whole:].unflatten(1, (-1, width - whole))


def _first_at_peak(request: Request, bundle_RU: Tensor, peak_R: Tensor) -> Tensor:
    """The lowest index whose sum equals the peak: looked up again in the first bundle that reaches it."""
    first_R1 = (bundle_RU == peak_R[:, None]).view(torch.uint8).argmax(dim=1, keepdim=True) * BUNDLE
    column_RC = (first_R1 + torch.arange(BUNDLE)).clamp_max_(request.vocabulary - 1)  # the last one again does no harm
    # a masked entry needs no care here: its sum is infinite or NaN, and the peak is finite
    x_RC = weighted_sum(_columns(request, column_RC), request.weights_NB)
    return first_R1[:, 0] + (x_RC == peak_R[:, None]).view(torch.uint8).argmax(dim=1)


def _joined(log_total_RS: Tensor, peak_RS: Tensor, peak_R: Tensor) -> Tensor:
    """(R,) the log of a row's sum of exponentials about its peak, of those of its splits about theirs."""
    log_total_RS = log_total_RS.masked_fill(peak_RS == -torch.inf, 0.0)  # of a split whose tokens are all masked
    # in this order the largest split's stays as it is
    return (log_total_RS + (peak_RS - peak_R[:, None])).exp().sum(dim=1).log()


def _own_logprobs(request: Request, token_R: Tensor) -> Tensor:
    """(N, R, 1 + G): log_softmax of each member at one token and at the targets, NaN where the member is left out."""
    target_RG = token_R[:, None] if request.targets is None else torch.cat((token_R[:, None], request.targets), dim=1)
    inside_RG = (target_RG >= 0) & (target_RG < request.vocabulary)
    column_RG = torch.where(inside_RG, target_RG, 0)
    own_NRG = torch.full((len(request.logits), *target_RG.shape), torch.nan)
    for number, logits_RV in enumerate(request.logits):
        used_R = slice(None) if request.left_out_NB is None else ~request.left_out_NB[number]
        logits_RV = logits_RV[used_R].float()
        splits = [split_RSC for _, split_RSC in _pieces(logits_RV, 0, SPLIT)]
        peak_RS = torch.cat([split_RSC.amax(dim=2) for split_RSC in splits], dim=1)
        log_total_RS = torch.cat([-split_RSC.log_softmax(dim=2).amax(dim=2) for split_RSC in splits], dim=1)
        peak_R = peak_RS.amax(dim=1)
        log_total_R = _joined(log_total_RS, peak_RS, peak_R)
        own_NRG[number, used_R] = logits_RV.gather(1, column_RG[used_R]) - peak_R[:, None] - log_total_R[:, None]
    return own_NRG.masked_fill_(~inside_RG, torch.nan)


def _ordered_key(x: Tensor, index: Tensor) -> Tensor:
    """int64 keys whose order is (x ascending, index descending); -0.0 counts as 0.0."""
    bits = (x + 0.0).view(torch.int32).to(torch.int64)
    return (torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) << 20) - index


def _best(request: Request, bundle_RU: Tensor) -> Tensor:
    """The k best tokens: they lie in the k bundles with the largest maxima, the lower bundle first on ties."""
    count = min(request.top_k, bundle_RU.shape[1])
    key_RU = _ordered_key(bundle_RU, torch.arange(bundle_RU.shape[1]))
    bundle_RK = key_RU.topk(count, dim=1).indices
    column_RC = (bundle_RK[:, :, None] * BUNDLE + torch.arange(BUNDLE)).flatten(1)
    inside_RC = column_RC < request.vocabulary
    x_RC = combined_at(request, torch.where(inside_RC, column_RC, 0)).masked_fill_(~inside_RC, -torch.inf)
    return column_RC.gather(1, _ordered_key(x_RC, column_RC).topk(request.top_k, dim=1).indices)


class _Sampler:
    """The best score so far of the rows that are sampled, I of them; greedy rows (temperature 0) are not scored."""

    def __init__(self, request: Request, sample: SamplingTensors, splits: int) -> None:
        self.greedy_R = sample.temperature == 0
        self.row_I = (~self.greedy_R).nonzero()[:, 0]
        self.all = len(self.row_I) == request.batch
        self.seed_I, self.row_id_I = sample.seed[self.row_I], sample.row_id[self.row_I]
        self.position_I = sample.position[self.row_I]
        self.scale_I1 = sample.temperature[self.row_I].reciprocal()[:, None]
        self.threshold_I1 = _thresholds(request, sample)[self.row_I, None] if sample.top_k is not None else None
        self.score_IS = torch.empty(len(self.row_I), splits)
        self.token_IS = torch.empty(len(self.row_I), splits, dtype=torch.int64)

    def add(self, x_RC: Tensor, start: int, stop: int) -> None:
        """Score a tile: x at the temperature plus noise, -inf where a token cannot be sampled."""
        x_IC = x_RC if self.all else x_RC[self.row_I]
        noise_IC = gumbel(random_words(self.seed_I, self.row_id_I, self.position_I, start, stop))
        score_IC = x_IC * self.scale_I1 + noise_IC
        if self.threshold_I1 is not None:
            score_IC = score_IC.masked_fill(x_IC < self.threshold_I1, -torch.inf)
        for here, score_ISC in _pieces(score_IC, start, SPLIT):
            self.score_IS[:, here], index_IS = score_ISC.max(dim=2)
            self.token_IS[:, here] = index_IS + torch.arange(here.start, here.stop) * SPLIT

    def token(self, token_R: Tensor) -> Tensor:
        """The sampled tokens; for greedy rows those of `token_R`."""
        split_I1 = self.score_IS.max(dim=1, keepdim=True).indices
        return token_R.index_copy(0, self.row_I, self.token_IS.gather(1, split_I1)[:, 0])


def _thresholds(request: Request, sample: SamplingTensors) -> Tensor:
    """The smallest x that top-k and top-p keep, -inf where they keep all; rows are sorted a few megabytes at a time."""
    assert sample.top_k is not None
    assert sample.top_p is not None
    threshold_R = torch.full((request.batch,), -torch.inf)
    truncated_R = ((sample.top_k != 0) | (sample.top_p < 1)) & (sample.temperature != 0)
    for here in truncated_R.nonzero()[:, 0].split(max(1, SORTED_ELEMENTS // request.vocabulary)):
        rows = Request(tuple(logits_RV[here] for logits_RV in request.logits), request.weights_NB[:, here])
        x_RV, _ = combined_tile(rows, 0, request.vocabulary)
        threshold_R[here] = reference.threshold(x_RV, sample.temperature[here], sample.top_k[here], sample.top_p[here])
    return threshold_R
