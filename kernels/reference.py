"""The definitions, in plain eager PyTorch. What stands here is what every kernel must mean.

Written to be read, not to be fast: each step is one line of the definition, over whole (N, R, V) tensors. With
`dtype=torch.float64` it is the truth that the tests compare with; in float32 it is the `eager` backend.

    R rows  V vocabulary  N members  K best  G given tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.request import EMPTY, INFINITE, NAN, RANGE, FusedLogits, Request

FLOAT32_MAX = torch.finfo(torch.float32).max


def combine(request: Request, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The weighted sum x = sum_i w_i * logits_i, added in the members' order, and each row's flag.

    A token that any member masks with -inf is masked, whatever the sign of that member's weight. NaN or +inf in any member,
    a partial sum or product beyond float32's range at an unmasked token, and a row without a token are flagged.
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
    return FusedLogits(
        token=torch.where(fine_R, token_R, -1),
        logprob=result(pick(logprob_RV, token_R)),
        flag=flag_R,
        member_logprob=member_logprob_NR,
        top_token=top_token_RK,
        top_logprob=top_logprob_RK,
        entropy=entropy_R,
        given_logprob=given_logprob_RG,
    )
