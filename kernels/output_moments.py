"""Output layers, weighted sum and softmax of an ensemble in chunks of the vocabulary: memory that does not grow with V.

    x = sum_i w_i h_i W_iᵀ = [w_1 h_1 … w_N h_N] [W_1 … W_N]ᵀ

A chunk of 4,096 vocabulary entries is one accumulated float32 matmul per block of rows; only its (maximum, index, sum
of exponentials), the targets' entries and the moments are kept.

Moments, for fitting the weights: with p = softmax(x), the gradient of log Z in w_i is E_p[l_i] and its second
derivative in (w_i, w_j) is Cov_p(l_i, l_j). Each chunk's are computed about its own best token and joined in float64.

Memory over the weights: about (5 + N for moments) buffers of ROWS x SPLIT floats and one chunk of one member's weight.
Bytes: each weight once; operations: 2 R V sum_i D_i.

    R rows  D width  V vocabulary  N members  C entries of a chunk  S chunks  G target tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu.fused_logits import checked_sum, weighted_sum
from kernels.types import ALL_MASKED, SPLIT, FusedHead

ROWS = 1024
_LOWEST = torch.finfo(torch.float32).min


def run(
    hidden: Sequence[Tensor], output: Sequence[Tensor], weights: Tensor, target_RG: Tensor | None, moments: bool
) -> FusedHead:
    """Every result of `kernels.fused_head`; output layers are read chunk by chunk, rows in blocks inside a chunk."""
    rows, vocabulary, device = len(hidden[0]), len(output[0]), hidden[0].device
    members, chunks = len(hidden) if moments else 0, -(-vocabulary // SPLIT)  # members whose own logits are kept
    weights_NR = weights if weights.dim() == 2 else weights[:, None].expand(-1, rows)
    token_RG = torch.empty(rows, 0, dtype=torch.int64, device=device) if target_RG is None else target_RG
    peak_RS = torch.empty(rows, chunks, device=device)
    total_RS = torch.empty(rows, chunks, device=device)
    token_RS = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    flag_R = torch.zeros(rows, dtype=torch.int32, device=device)
    x_RG = torch.full(token_RG.shape, torch.nan, device=device)
    own_NRG = torch.full((members, *token_RG.shape), torch.nan, device=device)
    mean_RSN = torch.empty(rows, chunks, members, dtype=torch.float64, device=device)
    spread_RSNN = torch.empty(rows, chunks, members, members, dtype=torch.float64, device=device)

    for chunk in range(chunks):
        start, stop = chunk * SPLIT, min(vocabulary, (chunk + 1) * SPLIT)
        logits_NRC: list[Tensor] = []
        for first in range(0, rows, ROWS):
            here = slice(first, min(rows, first + ROWS))
            hidden_NRD, output_NCD = [h_RD[here] for h_RD in hidden], [o_VD[start:stop] for o_VD in output]
            x_RC, logits_NRC, block_flag_R = _chunk(hidden_NRD, output_NCD, weights_NR[:, here], moments)
            if block_flag_R is not None:
                flag_R[here] = torch.maximum(flag_R[here], block_flag_R)
            peak_R, index_R = x_RC.max(dim=1)
            peak_RS[here, chunk], token_RS[here, chunk] = peak_R, index_R + start
            inside_RG = (token_RG[here] >= start) & (token_RG[here] < stop)
            column_RG = torch.where(inside_RG, token_RG[here] - start, 0)
            x_RG[here] = torch.where(inside_RG, x_RC.gather(1, column_RG), x_RG[here])
            for own_RG, logits_RC in zip(own_NRG, logits_NRC, strict=False):
                own_RG[here] = torch.where(inside_RG, logits_RC.gather(1, column_RG), own_RG[here])
            exp_RC = x_RC.sub_(peak_R.clamp_min(_LOWEST)[:, None]).exp_()
            total_RS[here, chunk] = exp_RC.sum(dim=1)
            if moments:
                mean_RSN[here, chunk], spread_RSNN[here, chunk] = _moments(exp_RC, logits_NRC, index_R)

    peak_R = peak_RS.amax(dim=1)
    flag_R = torch.where((peak_R == -torch.inf) & (flag_R == 0), ALL_MASKED * 16, flag_R)
    fine_R = flag_R == 0
    nan_R = torch.where(fine_R, 0.0, torch.nan)
    scale_RS = (peak_RS - peak_R[:, None]).exp()
    share_RS = total_RS * scale_RS
    log_total_R = share_RS.sum(dim=1).log()
    first_R1 = peak_RS.max(dim=1, keepdim=True).indices  # the first of equal ones, as inside a chunk
    mean_NR = covariance_NNR = None
    if moments:
        share_RS = share_RS.double() / share_RS.double().sum(dim=1, keepdim=True)
        mean_RN = torch.einsum("rs,rsn->rn", share_RS, mean_RSN)
        about_RSN = mean_RSN - mean_RN[:, None]
        covariance_NNR = torch.einsum("rs,rsnm->nmr", share_RS, spread_RSNN)
        covariance_NNR = covariance_NNR + torch.einsum("rs,rsn,rsm->nmr", share_RS, about_RSN, about_RSN)
        mean_NR, covariance_NNR = (mean_RN.T + nan_R).float(), (covariance_NNR + nan_R).float()
    return FusedHead(
        token=torch.where(fine_R, token_RS.gather(1, first_R1)[:, 0], -1),
        logprob=nan_R - log_total_R,
        flag=flag_R,
        target_logprob=None if target_RG is None else x_RG - peak_R[:, None] - log_total_R[:, None] + nan_R[:, None],
        target_logits=own_NRG if moments and target_RG is not None else None,
        mean=mean_NR,
        covariance=covariance_NNR,
    )


def _chunk(
    hidden_NRD: list[Tensor], output_NCD: list[Tensor], weights_NR: Tensor, moments: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """x of a block of rows and a chunk, the members' logits where they were computed, flags or None (all finite)."""

    def logits() -> list[Tensor]:
        return [h_RD.float() @ output_CD.float().T for h_RD, output_CD in zip(hidden_NRD, output_NCD, strict=True)]

    logits_NRC = logits() if moments else []
    if moments:
        x_RC = weighted_sum(logits_NRC, weights_NR)
    else:
        x_RC = weights_NR.new_empty(len(hidden_NRD[0]), len(output_NCD[0]))
        for number, weights_R in enumerate(weights_NR):
            scaled_RD = hidden_NRD[number].float() * weights_R[:, None]
            x_RC.addmm_(scaled_RD, output_NCD[number].float().T, beta=float(number > 0))
    if x_RC.amin() > -torch.inf and x_RC.amax() < torch.inf:
        return x_RC, logits_NRC, None
    logits_NRC = logits_NRC or logits()
    x_RC, flag_R = checked_sum(logits_NRC, weights_NR)
    return x_RC, logits_NRC, flag_R


def _moments(exp_RC: Tensor, logits_NRC: list[Tensor], index_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the members' logits in a chunk, float64, from deviations about the chunk's best token."""
    total_R = exp_RC.sum(dim=1).double()
    centre_RN = torch.stack([logits_RC.gather(1, index_R[:, None])[:, 0] for logits_RC in logits_NRC], dim=1)
    for number, logits_RC in enumerate(logits_NRC):
        logits_RC -= centre_RN[:, number, None]
    shift_RN = torch.stack([(exp_RC * logits_RC).sum(dim=1) for logits_RC in logits_NRC], dim=1).double()
    shift_RN /= total_R[:, None]
    spread_RNN = torch.empty(*shift_RN.shape, shift_RN.shape[1], dtype=torch.float64, device=exp_RC.device)
    for i, first_RC in enumerate(logits_NRC):
        weighted_RC = exp_RC * first_RC
        for j in range(i, len(logits_NRC)):
            spread_RNN[:, i, j] = spread_RNN[:, j, i] = (weighted_RC * logits_NRC[j]).sum(dim=1).double() / total_R
    spread_RNN -= shift_RN[:, :, None] * shift_RN[:, None, :]
    return shift_RN + centre_RN.double(), spread_RNN
