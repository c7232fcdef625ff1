"""Attribution: which member decided a token, from the logits of the step that chose it.

The margin of a token is its log-probability minus the runner-up's, the best other token of the combined distribution;
it is negative where sampling or beam search took another token than the best. Each member contributes

    contribution_i = w_i * (logit_i[token] - logit_i[runner-up]),    sum_i contribution_i = margin

The members' softmax normalisers cancel in the difference. Nothing here takes part in the choice: tokens and
log-probabilities are those of a run without explanations, and an explanation does not depend on the batch.

    N members  R rows of logits, one a token  V vocabulary
"""

from collections.abc import Sequence
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
        """Members of positive weight that alone would have chosen another token."""
        return [n for n, rank in enumerate(self.ranks) if rank is not None and rank > 1 and weights[n] > 0]


def explain(
    logits: Sequence[Tensor], weights: Tensor, tokens: Sequence[int], logprobs: Sequence[float]
) -> list[Explanation]:
    """One explanation for each row of the members' logits, N tensors (R, V).

    weights: (N,) or (N, R) float32; zero leaves a member out of that row.   tokens, logprobs: of each row the token
    that was chosen and its log-probability in nats under the combined distribution.
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

    both_R2 = torch.cat((token_R[:, None], runner_up_R1.clamp_min(0)), dim=1)
    both_NR2 = torch.stack([logits_RV.gather(1, both_R2).double() for logits_RV in logits])
    weights_NR = (weights if weights.dim() == 2 else weights[:, None]).double().expand(len(logits), len(tokens))
    left_out_NR = weights_NR == 0
    push_NR = (weights_NR * (both_NR2[:, :, 0] - both_NR2[:, :, 1])).masked_fill(left_out_NR, 0.0)

    own_logprob_NR = combined.member_target_logprob[:, :, 0].double()
    peak_NR = torch.stack([logits_RV.amax(dim=1).double() for logits_RV in logits])
    best_logprob_NR = own_logprob_NR + (peak_NR - both_NR2[:, :, 0])
    rank_NR, best_NR = _ranks_and_bests(logits, token_R, (both_NR2[:, :, 0] < peak_NR) & ~left_out_NR)

    columns = [runner_up_R1.T, runner_up_logprob_R1.T, own_logprob_NR, rank_NR, push_NR, best_NR, best_logprob_NR]
    rows = torch.cat([column.double() for column in columns]).round(decimals=DECIMALS).T.tolist()
    left_out = left_out_NR.T.tolist()
    return [_explanation(*row) for row in zip(tokens, logprobs, rows, left_out, strict=True)]


def _ranks_and_bests(logits: Sequence[Tensor], token_R: Tensor, other_NR: Tensor) -> tuple[Tensor, Tensor]:
    """(N, R): 1 + the number of larger logits than the token's, and the token with the largest.

    other_NR: where that is another token; only there are rows read. Of equal logits the chosen token's is the first.
    """
    rank_NR, best_NR = torch.ones_like(other_NR, dtype=torch.int64), token_R.repeat(len(logits), 1)
    for logits_RV, other_R, rank_R, best_R in zip(logits, other_NR, rank_NR, best_NR):
        rows_SV = logits_RV[other_R]
        if len(rows_SV):
            own_S1 = rows_SV.gather(1, token_R[other_R][:, None])
            rank_R[other_R] += (rows_SV > own_S1).sum(dim=1)
            best_R[other_R] = rows_SV.argmax(dim=1)
    return rank_NR, best_NR


def _explanation(token: int, logprob: float, values: list[float], left_out: list[bool]) -> Explanation:
    runner_up, runner_up_logprob, *of_members = values
    count = len(left_out)
    own, ranks, pushes, bests, best_logprobs = (of_members[at * count : (at + 1) * count] for at in range(5))

    def present(values: list[float]) -> list[float | None]:
        return [None if out else value for value, out in zip(values, left_out)]

    return Explanation(
        token,
        round(logprob, DECIMALS),
        None if runner_up < 0 else int(runner_up),
        None if runner_up < 0 else runner_up_logprob,
        present(own),
        [None if out else int(rank) for rank, out in zip(ranks, left_out)],
        [] if runner_up < 0 else pushes,
        [None if out else int(best) for best, out in zip(bests, left_out)],
        present(best_logprobs),
    )
