"""The definitions, in plain eager PyTorch. What stands here is what every kernel must mean.

Written to be read, not to be fast: each step is one line of the definition, over whole (N, R, V) tensors. With
`dtype=torch.float64` it is the truth that the tests compare with; in float32 it is the `eager` backend.

    R rows  V vocabulary  N members  K best  G given tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.philox import gumbel, random_words
from kernels.types import (
    EMPTY,
    INFINITE,
    NAN,
    RANGE,
    FusedHead,
    FusedLogits,
    HeadRequest,
    Request,
    Sampling,
    Verification,
)

FLOAT32_MAX = torch.finfo(torch.float32).max


def combine(request: Request, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The weighted sum x = sum_i w_i * logits_i, added in the members' order, and each row's flag.

    A token that any member masks with -inf is masked, whatever the sign of that member's weight. NaN or +inf in any
    member, a partial sum or product beyond float32's range at an unmasked token, and a row without a token are flagged.
    Returns x_RV in `dtype`, -inf where masked, and flag_R int32.
    """
    logits_NRV = torch.stack([logits_RV.to(dtype) for logits_RV in request.logits])
    weights_NR = request.weights_NR().to(dtype)
    masked_RV = (logits_NRV == -torch.inf).any(dim=0)
    x_RV = torch.zeros_like(logits_NRV[0])
    flag_RV = torch.zeros_like(x_RV, dtype=torch.int32)
    leaves_RV = torch.zeros_like(masked_RV)
    for number, logits_RV in enumerate(logits_NRV):
        product_RV = weights_NR[number][:, None] * logits_RV
        x_RV = product_RV if number == 0 else x_RV + product_RV
        beyond_RV = ~((product_RV.abs() <= FLOAT32_MAX) & (x_RV.abs() <= FLOAT32_MAX)) & ~masked_RV & ~leaves_RV
        leaves_RV = leaves_RV | beyond_RV
        for wrong_RV, kind in ((beyond_RV, RANGE), (logits_RV == torch.inf, INFINITE), (logits_RV.isnan(), NAN)):
            flag_RV = torch.where(wrong_RV, flag_RV.clamp_min(kind * 16 + number + 1), flag_RV)
    x_RV = torch.where(masked_RV, -torch.inf, x_RV)
    flag_R = flag_RV.amax(dim=1)
    empty_R = masked_RV.all(dim=1) & (flag_R == 0)
    return x_RV, torch.where(empty_R, EMPTY * 16, flag_R)


def fused_logits(request: Request, dtype: torch.dtype = torch.float32) -> FusedLogits:
    """Every result of the family by its definition."""
    x_RV, flag_R = combine(request, dtype)
    fine_R = flag_R == 0
    x_RV = torch.where(fine_R[:, None], x_RV, 0.0)
    logprob_RV = torch.log_softmax(x_RV, dim=1)
    token_R = x_RV.argmax(dim=1)

    def result(values: Tensor) -> Tensor:
        shape = [-1] + [1] * (values.dim() - 1)
        return torch.where(fine_R.view(shape), values, torch.nan).float()

    def pick(values_RV: Tensor, token_R: Tensor) -> Tensor:
        return values_RV.gather(1, token_R[:, None])[:, 0]

    member_logprob_NR = top_token_RK = top_logprob_RK = entropy_R = given_logprob_RG = None
    if request.members:
        member_logprob_NR = torch.stack(
            [result(pick(torch.log_softmax(logits_RV.to(dtype), dim=1), token_R)) for logits_RV in request.logits]
        )
    if request.top_k:
        best_RK = x_RV.sort(dim=1, descending=True, stable=True).indices[:, : request.top_k]
        best_logprob_RK = logprob_RV.gather(1, best_RK)
        top_token_RK = torch.where(fine_R[:, None] & (best_logprob_RK > -torch.inf), best_RK, -1)
        top_logprob_RK = result(best_logprob_RK)
    if request.entropy:
        entropy_R = result(torch.special.entr(logprob_RV.exp()).sum(dim=1))
    if request.given is not None:
        inside_RG = (request.given >= 0) & (request.given < request.vocabulary)
        values_RG = logprob_RV.gather(1, torch.where(inside_RG, request.given, 0))
        given_logprob_RG = result(torch.where(inside_RG, values_RG, torch.nan))
    sample_token_R = sample_logprob_R = None
    if request.sample is not None:
        drawn_R = draw(x_RV, request.sample)
        sample_token_R = torch.where(fine_R, drawn_R, -1)
        sample_logprob_R = result(pick(logprob_RV, drawn_R))
    return FusedLogits(
        token=torch.where(fine_R, token_R, -1),
        logprob=result(pick(logprob_RV, token_R)),
        flag=flag_R,
        member_logprob=member_logprob_NR,
        top_token=top_token_RK,
        top_logprob=top_logprob_RK,
        entropy=entropy_R,
        given_logprob=given_logprob_RG,
        sample_token=sample_token_R,
        sample_logprob=sample_logprob_R,
    )


def draw(x_RV: Tensor, sample: Sampling) -> Tensor:
    """A draw from softmax(x / temperature) over the kept tokens: the largest of x / temperature + Gumbel noise.

    (Gumbel, "Statistical Theory of Extreme Values", 1954; restricting the maximum to the kept tokens renormalises.)
    """
    assert isinstance(sample.temperature, Tensor)  # check_sampling made it one
    words_RV = random_words(int(sample.seed), sample.row_id, sample.position, 0, x_RV.shape[1])
    score_RV = x_RV * (1.0 / sample.temperature)[:, None] + gumbel(words_RV, x_RV.dtype)
    if sample.truncated:
        score_RV = score_RV.masked_fill(x_RV < threshold(x_RV, sample.temperature, sample)[:, None], -torch.inf)
    return score_RV.argmax(dim=1)


def threshold(x_RV: Tensor, temperature_R: Tensor, sample: Sampling) -> Tensor:
    """The smallest x that is kept: fewer than top_k tokens are strictly larger and those have a mass below top_p."""
    sorted_RV = x_RV.sort(dim=1, descending=True).values
    tempered_RV = (sorted_RV.double() - sorted_RV[:, :1].double()) / temperature_R.double()[:, None]
    mass_RV = tempered_RV.softmax(dim=1)
    before_RV = mass_RV.cumsum(dim=1) - mass_RV
    position_RV = torch.arange(x_RV.shape[1], device=x_RV.device).expand_as(x_RV)
    # of a group of equal tokens the first decides: what stands before it is what is strictly larger
    first_RV = torch.ones_like(sorted_RV, dtype=torch.bool)
    first_RV[:, 1:] = sorted_RV[:, 1:] != sorted_RV[:, :-1]
    kept_RV = first_RV & ((position_RV < sample.top_k) if sample.top_k else True)
    if sample.top_p < 1:
        kept_RV = kept_RV & (before_RV < sample.top_p)
    kept_RV[:, 0] = True
    return sorted_RV.masked_fill(~kept_RV, torch.inf).amin(dim=1)


def accept(request: Request, steps: FusedLogits) -> Verification:
    """The longest drafted prefix that equals the combined argmax, from the results of all positions."""
    token_BT = steps.token.view(-1, request.every)
    agrees_BT = (token_BT[:, :-1] == request.draft) & (token_BT[:, :-1] >= 0)
    accepted_B = agrees_BT.to(torch.int64).cumprod(dim=1).sum(dim=1)

    def at_end(values_R: Tensor) -> Tensor:
        return values_R.view(-1, request.every).gather(1, accepted_B[:, None])[:, 0]

    return Verification(accepted_B, at_end(steps.token), at_end(steps.logprob), at_end(steps.flag), steps)


def verify(request: Request, dtype: torch.dtype = torch.float32) -> Verification:
    """Verification by its definition."""
    return accept(request, fused_logits(request, dtype))


def fused_head(request: HeadRequest, dtype: torch.dtype = torch.float32) -> FusedHead:
    """Output layers, weighted sum, log-softmax, argmax and moments, with all logits in memory."""
    pairs = zip(request.hidden, request.output, strict=True)
    logits_NRV = torch.stack([hidden_RD.to(dtype) @ output_VD.to(dtype).T for hidden_RD, output_VD in pairs])
    sums = Request(tuple(logits_NRV), request.weights, given=request.given)
    result = fused_logits(sums, dtype)
    mean_NR = covariance_NNR = given_logits_NRG = None
    if request.moments:
        x_RV, flag_R = combine(sums, dtype)
        p_RV = torch.where((flag_R == 0)[:, None], torch.softmax(x_RV, dim=1), torch.nan)
        mean_NR = torch.einsum("rv,nrv->nr", p_RV, logits_NRV)
        about_NRV = logits_NRV - mean_NR[:, :, None]
        covariance_NNR = torch.einsum("rv,nrv,mrv->nmr", p_RV, about_NRV, about_NRV)
        if request.given is not None:
            inside_RG = (request.given >= 0) & (request.given < request.vocabulary)
            token_RG = torch.where(inside_RG, request.given, 0)
            own_NRG = torch.stack([logits_RV.gather(1, token_RG) for logits_RV in logits_NRV])
            given_logits_NRG = torch.where(inside_RG, own_NRG, torch.nan).float()
        mean_NR, covariance_NNR = mean_NR.float(), covariance_NNR.float()
    return FusedHead(
        token=result.token,
        logprob=result.logprob,
        flag=result.flag,
        given_logprob=result.given_logprob,
        given_logits=given_logits_NRG,
        mean=mean_NR,
        covariance=covariance_NNR,
    )


def linear_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """Summed cross-entropy of an output layer with all its logits in memory, in float32 or wider; autograd's gradients.

    In float64 throughout it is the truth.
    """
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD)
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits_RV.to(wide), target_R, reduction="sum")
