"""Attribution: which member decided a token, from the logits of the step that chose it.

The margin of a token is its log-probability minus the runner-up's, the best other token of the combined distribution;
it is negative where sampling or beam search took another token than the best. Each member contributes

    contribution_i = w_i * (logit_i[token] - logit_i[runner-up]),    sum_i contribution_i = margin

The members' softmax normalisers cancel in the difference. Nothing here takes part in sampling: tokens and
log-probabilities are those of a run without explanations, and an explanation does not depend on the batch.

    N members  R rows of logits, one a token  V vocabulary
"""

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import fused_logits

# Figures are kept to a millionth of a nat, so that journals stay short.
DECIMALS = 6


class Explanation(NamedTuple):
    """How one token came out of the weighted sum. A journal holds it as a plain list; log-probabilities are in nats.

    logprob: of the token under the combined distribution.   runner_up, runner_up_logprob: the best other token; None
    where every other token is masked.
    A value per member: `logprobs`, its own log-probability of the token; `ranks`, 1 + the number of tokens that are
    more probable to it; `pushes`, the contributions to the margin, empty without a runner-up; `bests` and
    `best_logprobs`, its most probable token. A member with weight zero contributes 0 and has None everywhere else.
    """

    token: int
    logprob: float
    runner_up: int | None
    runner_up_logprob: float | None
    logprobs: list[float | None]
    ranks: list[int | None]
    pushes: list[float]
    bests: list[int | None]
    best_logprobs: list[float | None]

    @property
    def margin(self) -> float | None:
        return None if self.runner_up_logprob is None else self.logprob - self.runner_up_logprob

    @property
    def decider(self) -> int | None:
        """The member with the largest contribution, if that is positive and the token is the best of the sum.

        None where another token is the best: then sampling or the search decided, not a member.
        """
        if self.margin is None or self.margin < 0 or max(self.pushes) <= 0:
            return None
        return self.pushes.index(max(self.pushes))

    def overruled(self, weights: Sequence[float]) -> list[int]:
        """Members of positive weight that alone would have sampled another token."""
        return [n for n, rank in enumerate(self.ranks) if rank is not None and rank > 1 and weights[n] > 0]


def explain(
    logits: Sequence[Tensor], weights: Tensor, tokens: Sequence[int], logprobs: Sequence[float]
) -> list[Explanation]:
    """One explanation for each row of the members' logits, N tensors (R, V).

    weights: (N,) or (N, R) float32; zero leaves a member out of that row.   tokens, logprobs: of each row the token
    that was sampled and its log-probability in nats under the combined distribution.
    """
    token_R = torch.tensor(tokens, device=logits[0].device)
    combined = fused_logits(logits, weights, members=True, top_k=2, targets=token_R)
    assert combined.top_token is not None
    assert combined.top_logprob is not None
    assert combined.member_target_logprob is not None
    # The first of the two best that is not the token itself; -1 where that one is masked.
    second_R1 = (combined.top_token[:, :1] == token_R[:, None]).long()
    runner_up_R1 = combined.top_token.gather(1, second_R1)
    runner_up_logprob_R1 = combined.top_logprob.gather(1, second_R1)

    both_R2 = torch.cat((runner_up_R1.clamp_min(0), token_R[:, None]), dim=1)
    lead_NR = torch.cat([logits_RV.gather(1, both_R2).double().diff(dim=1).T for logits_RV in logits])
    weights_NR = (weights if weights.dim() == 2 else weights[:, None]).double().expand_as(lead_NR)
    logprob_NR = combined.member_target_logprob[:, :, 0].double()
    behind_NR, rank_NR, best_NR = map(torch.stack, zip(*(_alone(logits_RV, token_R) for logits_RV in logits)))
    values_5NR = torch.stack((logprob_NR, rank_NR, weights_NR * lead_NR, best_NR, logprob_NR + behind_NR))
    values_5NR.masked_fill_(weights_NR == 0, torch.nan)
    columns = runner_up_R1[:, 0], runner_up_logprob_R1[:, 0], values_5NR.permute(2, 0, 1)
    figures = (column.double().round(decimals=DECIMALS).tolist() for column in columns)
    return [_explanation(*row) for row in zip(tokens, logprobs, *figures, strict=True)]


def _alone(logits_RV: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one member, (R,) float64: how far the token's logit is below the largest, 1 + the number of larger logits, and
    the token with the largest; of equal logits the sampled token's is the first.
    """
    own_R1 = logits_RV.gather(1, token_R[:, None])
    behind_R = logits_RV.amax(dim=1).double() - own_R1[:, 0].double()
    rank_R, best_R = torch.ones_like(token_R), token_R.clone()
    rows_S = (behind_R > 0).nonzero()[:, 0]  # only these are read again
    if len(rows_S):
        logits_SV = logits_RV[rows_S]
        rank_R[rows_S] += (logits_SV > own_R1[rows_S]).sum(dim=1)
        best_R[rows_S] = logits_SV.argmax(dim=1)
    return behind_R, rank_R.double(), best_R.double()


def _explanation(
    token: int, logprob: float, runner_up: float, runner_up_logprob: float, values_5N: list[list[float]]
) -> Explanation:
    """The values of a member that is left out are NaN."""
    own, ranks, pushes, bests, best_logprobs = values_5N
    return Explanation(
        token,
        round(logprob, DECIMALS),
        None if runner_up < 0 else int(runner_up),
        None if runner_up < 0 else runner_up_logprob,
        [None if isnan(value) else value for value in own],
        [None if isnan(rank) else int(rank) for rank in ranks],
        [] if runner_up < 0 else [0.0 if isnan(push) else push for push in pushes],
        [None if isnan(best) else int(best) for best in bests],
        [None if isnan(value) else value for value in best_logprobs],
    )
