"""Why a token was chosen: what each member said of it, and how much each pushed it past the runner-up.

    push_i = w_i * (logit_i[chosen] - logit_i[runner-up]),    sum_i push_i = margin

The runner-up is the best other token of the combined distribution, and the margin by how many nats the chosen token is
ahead of it (behind it where a draw or a search took another token than the best). A member's softmax does not enter:
what it says of all other tokens cancels in the difference.

Computed from the logits of the step that chose, beside the choice and without a part in it: tokens and
log-probabilities are those of a run that explains nothing. Eager operations on whole rows; no kernel of its own.
"""

# N members  R rows  S some of them  V vocabulary

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.types import SPLIT, Request

# Decimals of the figures kept: nats to a millionth, so that journals stay short.
DECIMALS = 6


class Explanation(NamedTuple):
    """How one token came out of the weighted sum. A journal holds it as a plain list.

    logprob: of the token under the combined distribution, nats.   runner_up: the best other token and its
    log-probability; None where every other token is masked.
    A value per member: `logprobs`, its own log-probability of the token; `ranks`, 1 and the number of tokens that it
    holds more probable; `pushes`, see the head of this file, empty without a runner-up; `bests` and `best_logprobs`,
    the token that it holds most probable.
    """

    token: int
    logprob: float
    runner_up: int | None
    runner_up_logprob: float | None
    logprobs: list[float]
    ranks: list[int]
    pushes: list[float]
    bests: list[int]
    best_logprobs: list[float]

    @property
    def margin(self) -> float | None:
        return None if self.runner_up_logprob is None else self.logprob - self.runner_up_logprob

    @property
    def decider(self) -> int | None:
        """The member with the largest push, where that is positive and the token is the best of the sum.

        None where another token was: then the draw or the search decided, no member.
        """
        if self.margin is None or self.margin < 0 or max(self.pushes) <= 0:
            return None
        return self.pushes.index(max(self.pushes))

    def overruled(self, weights: Sequence[float]) -> list[int]:
        """Members of positive weight that would have chosen another token by themselves."""
        return [number for number, rank in enumerate(self.ranks) if rank > 1 and weights[number] > 0]


def explain(
    logits: Sequence[Tensor], weights_N: Tensor, tokens: Sequence[int], logprobs: Sequence[float]
) -> list[Explanation]:
    """For each row of the members' logits, tensors (R, V) that a choice was made from, why its token was chosen.

    tokens, logprobs: the chosen ones, and their log-probabilities in nats under the combined distribution.
    """
    weights_N = weights_N.double()
    token_R1 = torch.tensor(tokens, device=logits[0].device)[:, None]
    logits = [logits_RV.float() for logits_RV in logits]
    x_RV = _combined(logits, weights_N.float())
    chosen_R1 = x_RV.gather(1, token_R1).double()
    runner_up_R1 = x_RV.scatter_(1, token_R1, -torch.inf).argmax(dim=1, keepdim=True)
    behind_R1 = x_RV.gather(1, runner_up_R1).double() - chosen_R1
    both_R2 = torch.cat((token_R1, runner_up_R1), dim=1)
    both_NR2 = torch.stack([logits_RV.gather(1, both_R2) for logits_RV in logits])
    peak_NR = torch.stack([logits_RV.amax(dim=1) for logits_RV in logits])
    log_total_NR = _log_totals(logits, peak_NR)
    rank_NR, best_NR = _ranks_and_bests(logits, both_NR2[:, :, 0], peak_NR, token_R1[:, 0])
    push_NR = weights_N[:, None] * (both_NR2[:, :, 0].double() - both_NR2[:, :, 1].double())
    own_NR = both_NR2[:, :, 0].double() - peak_NR.double() - log_total_NR
    parts = [runner_up_R1.T, behind_R1.T, own_NR, rank_NR, push_NR, best_NR, -log_total_NR]
    found = torch.cat([part.double() for part in parts]).round(decimals=DECIMALS).T.tolist()
    return [_explanation(token, logprob, values) for token, logprob, values in zip(tokens, logprobs, found)]


def _explanation(token: int, logprob: float, values: list[float]) -> Explanation:
    runner_up, behind, *of_members = values
    count = len(of_members) // 5
    own, ranks, pushes, bests, best_logprobs = (of_members[at * count : (at + 1) * count] for at in range(5))
    alone = behind == -torch.inf
    return Explanation(
        token,
        round(logprob, DECIMALS),
        None if alone else int(runner_up),
        None if alone else round(logprob + behind, DECIMALS),
        own,
        [int(rank) for rank in ranks],
        [] if alone else pushes,
        [int(best) for best in bests],
        best_logprobs,
    )


def _combined(logits: Sequence[Tensor], weights_N: Tensor) -> Tensor:
    """The weighted sum (R, V) in float32 as the kernels form it, -inf where a member masks."""
    x_RV = logits[0] * weights_N[0]
    for logits_RV, weight in zip(logits[1:], weights_N[1:]):
        x_RV += logits_RV * weight
    low, high = x_RV.aminmax()
    if low > -torch.inf and high < torch.inf:  # both carry NaN
        return x_RV
    return reference.combine(Request(tuple(logits), weights_N))[0]


def _log_totals(logits: Sequence[Tensor], peak_NR: Tensor) -> Tensor:
    """(N, R): the log of each member's sum of exponentials about its peak.

    Added split by split: a single long row would be added in another order than one of several.
    """
    shifted_NRV = torch.empty(len(logits), *logits[0].shape, device=peak_NR.device)
    for logits_RV, peak_R, shifted_RV in zip(logits, peak_NR, shifted_NRV):
        torch.sub(logits_RV, peak_R[:, None], out=shifted_RV)
    parts = [part_NRC.sum(dim=2) for part_NRC in shifted_NRV.exp_().split(SPLIT, dim=2)]
    return torch.stack(parts).sum(dim=0).log()


def _ranks_and_bests(
    logits: Sequence[Tensor], own_NR: Tensor, peak_NR: Tensor, token_R: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, R) 1 + the number of larger logits than the token's own, and the token with the largest.

    Rows are read only where that is another token. Of equal logits the chosen token's counts as the largest.
    """
    rank_NR, best_NR = torch.ones_like(own_NR, dtype=torch.int64), token_R.repeat(len(logits), 1)
    elsewhere_NR = own_NR < peak_NR
    rows = [logits_RV[there_R] for logits_RV, there_R in zip(logits, elsewhere_NR)]
    rows_SV = torch.cat(rows)
    if len(rows_SV):
        rank_NR[elsewhere_NR] += (rows_SV > own_NR[elsewhere_NR][:, None]).sum(dim=1)
        best_NR[elsewhere_NR] = rows_SV.argmax(dim=1)
    return rank_NR, best_NR
