"""The definitions, in plain eager PyTorch. What this file computes is what every kernel must mean.

Each step is one line of the definition, over whole (N, B, V) tensors. In float64 it is the truth that the tests compare
with; in float32 it is the `eager` backend.

    B sequences  V vocabulary  N members  K best  G target tokens  R rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.philox import gumbel, random_words
from kernels.types import ALL_MASKED, INFINITE, NAN, OVERFLOW, FusedHead, FusedLogits, Request, SamplingTensors

FLOAT32_MAX = torch.finfo(torch.float32).max


def combine(request: Request, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The weighted sum x = sum_i w_i * logits_i, added in the members' order, and each sequence's flag.

    A member whose weight is 0 is left out: its logits count as 0, whatever they hold. A token that any other member
    masks with -inf is masked, whatever the sign of that member's weight. NaN or +inf in any member, a partial sum or
    product beyond float32's range at an unmasked token, and a sequence without a token are flagged.
    Returns x_BV in `dtype`, -inf where masked, and flag_B int32.
    """
    logits_NBV = torch.stack([logits_BV.to(dtype) for logits_BV in request.logits])
    weights_NB = request.weights_NB.to(dtype)
    logits_NBV = torch.where(weights_NB[:, :, None] == 0, 0.0, logits_NBV)
    masked_BV = (logits_NBV == -torch.inf).any(dim=0) | (weights_NB == 0).all(dim=0)[:, None]
    x_BV = torch.zeros_like(logits_NBV[0])
    flag_BV = torch.zeros_like(x_BV, dtype=torch.int32)
    overflowed_BV = torch.zeros_like(masked_BV)
    for number, logits_BV in enumerate(logits_NBV):
        product_BV = weights_NB[number][:, None] * logits_BV
        x_BV = product_BV if number == 0 else x_BV + product_BV
        beyond_BV = ~((product_BV.abs() <= FLOAT32_MAX) & (x_BV.abs() <= FLOAT32_MAX)) & ~masked_BV & ~overflowed_BV
        overflowed_BV = overflowed_BV | beyond_BV
        for wrong_BV, kind in ((beyond_BV, OVERFLOW), (logits_BV == torch.inf, INFINITE), (logits_BV.isnan(), NAN)):
            flag_BV = torch.where(wrong_BV, flag_BV.clamp_min(kind * 16 + number + 1), flag_BV)
    x_BV = torch.where(masked_BV, -torch.inf, x_BV)
    flag_B = flag_BV.amax(dim=1)
    empty_B = masked_BV.all(dim=1) & (flag_B == 0)
    return x_BV, torch.where(empty_B, ALL_MASKED * 16, flag_B)


def fused_logits(request: Request, dtype: torch.dtype = torch.float32) -> FusedLogits:
    """Every result by its definition."""
    x_BV, flag_B = combine(request, dtype)
    fine_B = flag_B == 0
    x_BV = torch.where(fine_B[:, None], x_BV, 0.0)
    logprob_BV = torch.log_softmax(x_BV, dim=1)
    token_B = x_BV.argmax(dim=1)

    def result(values: Tensor) -> Tensor:
        shape = [-1] + [1] * (values.dim() - 1)
        return torch.where(fine_B.view(shape), values, torch.nan).float()

    def at(values_BV: Tensor, token_BG: Tensor) -> Tensor:
        return result(entries(values_BV, token_BG))

    results: dict[str, Tensor] = {}
    if request.sample is not None:
        sample_token_B = sample(x_BV, request.sample)
        results["sample_token"] = torch.where(fine_B, sample_token_B, -1)
        results["sample_logprob"] = at(logprob_BV, sample_token_B[:, None])[:, 0]
    if request.top_k:
        best_BK = x_BV.sort(dim=1, descending=True, stable=True).indices[:, : request.top_k]
        best_logprob_BK = logprob_BV.gather(1, best_BK)
        results["top_token"] = torch.where(fine_B[:, None] & (best_logprob_BK > -torch.inf), best_BK, -1)
        results["top_logprob"] = result(best_logprob_BK)
    if request.targets is not None:
        results["target_logprob"] = at(logprob_BV, request.targets)
    if request.members:
        own_NBV = [
            torch.where((weights_B == 0)[:, None], torch.nan, torch.log_softmax(logits_BV.to(dtype), dim=1))
            for logits_BV, weights_B in zip(request.logits, request.weights_NB, strict=True)
        ]
        token_B1 = (token_B if request.sample is None else sample_token_B)[:, None]
        results["member_logprob"] = torch.stack([at(own_BV, token_B1)[:, 0] for own_BV in own_NBV])
        if request.targets is not None:
            results["member_target_logprob"] = torch.stack([at(own_BV, request.targets) for own_BV in own_NBV])
    logprob_B = at(logprob_BV, token_B[:, None])[:, 0]
    return FusedLogits(torch.where(fine_B, token_B, -1), logprob_B, flag_B, **results)


def entries(values_BV: Tensor, token_BG: Tensor) -> Tensor:
    """The values at the tokens, NaN outside 0 .. V-1."""
    inside_BG = (token_BG >= 0) & (token_BG < values_BV.shape[1])
    return torch.where(inside_BG, values_BV.gather(1, torch.where(inside_BG, token_BG, 0)), torch.nan)


def sample(x_BV: Tensor, sample: SamplingTensors) -> Tensor:
    """A token from softmax(x / temperature) over the kept tokens: the largest of x / temperature + Gumbel noise.

    (Gumbel, "Statistical Theory of Extreme Values", 1954; restricting the maximum to the kept tokens renormalises.)
    At temperature 0 the largest x itself.
    """
    greedy_B = sample.temperature == 0
    temperature_B = torch.where(greedy_B, 1.0, sample.temperature)  # a greedy sequence's scores are not used
    words_BV = random_words(sample.seed, sample.row_id, sample.position, 0, x_BV.shape[1])
    score_BV = x_BV * (1.0 / temperature_B)[:, None] + gumbel(words_BV, x_BV.dtype)
    if sample.top_k is not None and sample.top_p is not None:
        threshold_B = threshold(x_BV, temperature_B, sample.top_k, sample.top_p)
        score_BV = score_BV.masked_fill(x_BV < threshold_B[:, None], -torch.inf)
    return torch.where(greedy_B[:, None], x_BV, score_BV).argmax(dim=1)


def threshold(x_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """The smallest x that is kept: fewer than top_k tokens are strictly larger and those have a mass below top_p."""
    sorted_RV = x_RV.sort(dim=1, descending=True).values
    tempered_RV = (sorted_RV.double() - sorted_RV[:, :1].double()) / temperature_R.double()[:, None]
    mass_RV = tempered_RV.softmax(dim=1)
    before_RV = mass_RV.cumsum(dim=1) - mass_RV
    position_RV = torch.arange(x_RV.shape[1], device=x_RV.device).expand_as(x_RV)
    # of a group of equal tokens the first decides: the tokens before it are the strictly larger ones
    kept_RV = torch.ones_like(sorted_RV, dtype=torch.bool)
    kept_RV[:, 1:] = sorted_RV[:, 1:] != sorted_RV[:, :-1]
    kept_RV &= (top_k_R == 0)[:, None] | (position_RV < top_k_R[:, None])
    kept_RV &= (top_p_R >= 1)[:, None] | (before_RV < top_p_R[:, None])
    kept_RV[:, 0] = True
    return sorted_RV.masked_fill(~kept_RV, torch.inf).amin(dim=1)


def fused_head(
    hidden: Sequence[Tensor],
    output: Sequence[Tensor],
    weights: Tensor,
    targets: Tensor | None = None,
    moments: bool = False,
    dtype: torch.dtype = torch.float32,
) -> FusedHead:
    """Output layers, weighted sum, log-softmax, argmax and moments, with all logits in memory."""
    pairs = zip(hidden, output, strict=True)
    logits_NBV = torch.stack([hidden_BD.to(dtype) @ output_VD.to(dtype).T for hidden_BD, output_VD in pairs])
    sums = Request(tuple(logits_NBV), weights, targets=targets)
    result = fused_logits(sums, dtype)
    mean_NB = covariance_NNB = target_logits_NBG = None
    if moments:
        x_BV, flag_B = combine(sums, dtype)
        p_BV = torch.where((flag_B == 0)[:, None], torch.softmax(x_BV, dim=1), torch.nan)
        mean_NB = torch.einsum("bv,nbv->nb", p_BV, logits_NBV)
        about_NBV = logits_NBV - mean_NB[:, :, None]
        covariance_NNB = torch.einsum("bv,nbv,mbv->nmb", p_BV, about_NBV, about_NBV).float()
        mean_NB = mean_NB.float()
        if targets is not None:
            target_logits_NBG = torch.stack([entries(logits_BV, targets) for logits_BV in logits_NBV]).float()
    values = result.token, result.logprob, result.flag, result.target_logprob
    return FusedHead(*values, target_logits_NBG, mean_NB, covariance_NNB)


def linear_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """Summed cross-entropy of an output layer, float32 or wider, with all logits in memory and autograd's gradients."""
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD)
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits_RV.to(wide), target_R, reduction="sum")
