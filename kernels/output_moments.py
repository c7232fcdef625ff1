"""Output layers, weighted sum and softmax of an ensemble in chunks of the vocabulary: memory that does not grow with V.

    x = sum_i w_i h_i W_iᵀ = [w_1 h_1 … w_N h_N] [W_1 … W_N]ᵀ

A chunk of 4,096 vocabulary entries is one accumulated product per block of rows; from it only (maximum, index, sum of
exponentials), the entries asked for and the moments survive. Weights in half precision are brought to float32 a chunk
at a time, so the products are float32's.

Moments, for fitting the weights: with p = softmax(x), the gradient of log Z in w_i is E_p[l_i] and its second
derivative in (w_i, w_j) is Cov_p(l_i, l_j). Each chunk's are taken about its own best token, where the mass is, and
joined in float64.

This is the CPU path, and on a GPU the path of the moments. Memory over the weights: about (5 + N for moments) buffers
of ROWS x CHUNK floats and one chunk of one member's weight. Bytes: each weight once; operations: 2 R V sum_i D_i.

    R rows  D width  V vocabulary  N members  C entries of a chunk  S chunks  G target tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.fused_logits import checked_sum
from kernels.types import ALL_MASKED, SPLIT, FusedHead, HeadRequest

ROWS = 1024
_LOWEST = torch.finfo(torch.float32).min


def run(request: HeadRequest) -> FusedHead:
    """Every result of the request; weights are read chunk by chunk, rows in blocks inside a chunk."""
    rows, vocabulary, members, device = request.batch, request.vocabulary, len(request.hidden), request.device
    chunks = -(-vocabulary // SPLIT)
    peak_RS = torch.empty(rows, chunks, device=device)
    total_RS = torch.empty(rows, chunks, device=device)
    token_RS = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    flag_R = torch.zeros(rows, dtype=torch.int32, device=device)
    target_RG = request.targets
    x_RG = None if target_RG is None else torch.full(target_RG.shape, torch.nan, device=device)
    own_NRG = None
    if target_RG is not None and request.moments:
        own_NRG = torch.full((members, *target_RG.shape), torch.nan, device=device)
    mean_RSN = torch.empty(rows, chunks, members, dtype=torch.float64, device=device) if request.moments else None
    spread_RSNN = mean_RSN.new_empty(rows, chunks, members, members) if mean_RSN is not None else None

    for chunk in range(chunks):
        start, stop = chunk * SPLIT, min(vocabulary, (chunk + 1) * SPLIT)
        logits_NRC: list[Tensor] = []
        for first in range(0, rows, ROWS):
            here = slice(first, min(rows, first + ROWS))
            x_RC, logits_NRC, block_flag_R = _chunk(request, here, start, stop)
            if block_flag_R is not None:
                flag_R[here] = torch.maximum(flag_R[here], block_flag_R)
            peak_R, index_R = x_RC.max(dim=1)
            peak_RS[here, chunk], token_RS[here, chunk] = peak_R, index_R + start
            if target_RG is not None and x_RG is not None:
                inside_RG = (target_RG[here] >= start) & (target_RG[here] < stop)
                column_RG = torch.where(inside_RG, target_RG[here] - start, 0)
                x_RG[here] = torch.where(inside_RG, x_RC.gather(1, column_RG), x_RG[here])
                if own_NRG is not None:
                    for number, logits_RC in enumerate(logits_NRC):
                        own_RG = own_NRG[number]
                        own_RG[here] = torch.where(inside_RG, logits_RC.gather(1, column_RG), own_RG[here])
            exp_RC = x_RC.sub_(peak_R.clamp_min(_LOWEST)[:, None]).exp_()
            total_RS[here, chunk] = exp_RC.sum(dim=1)
            if mean_RSN is not None and spread_RSNN is not None:
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
    if mean_RSN is not None and spread_RSNN is not None:
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
        target_logprob=None if x_RG is None else x_RG - peak_R[:, None] - log_total_R[:, None] + nan_R[:, None],
        target_logits=own_NRG,
        mean=mean_NR,
        covariance=covariance_NNR,
    )


def _chunk(request: HeadRequest, here: slice, start: int, stop: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """x of one block of rows and one chunk, the members' own logits if moments need them, and flags, None if all is
    finite.
    """
    weights_NR = request.weights_NB[:, here]

    def product(number: int) -> Tensor:
        output_CD = request.output[number][start:stop].float()
        return request.hidden[number][here].float() @ output_CD.T

    if request.moments:
        logits_NRC = [product(number) for number in range(len(request.hidden))]
        x_RC = logits_NRC[0] * weights_NR[0][:, None]
        for logits_RC, weights_R in zip(logits_NRC[1:], weights_NR[1:], strict=True):
            x_RC += logits_RC * weights_R[:, None]
    else:
        logits_NRC = []
        x_RC = torch.empty(here.stop - here.start, stop - start, device=request.device)
        for number, weights_R in enumerate(weights_NR):
            scaled_RD = request.hidden[number][here].float() * weights_R[:, None]
            x_RC.addmm_(scaled_RD, request.output[number][start:stop].float().T, beta=float(number > 0))
    if x_RC.amin() > -torch.inf and x_RC.amax() < torch.inf:
        return x_RC, logits_NRC, None
    logits_NRC = logits_NRC or [product(number) for number in range(len(request.hidden))]
    x_RC, flag_R = checked_sum(logits_NRC, weights_NR)
    return x_RC, logits_NRC, flag_R


def _moments(exp_RC: Tensor, logits_NRC: list[Tensor], index_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the members' logits within a chunk, float64, from deviations about the chunk's best
    token.
    """
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
