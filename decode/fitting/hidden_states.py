"""The likelihood of translations as a function of the weights, from the members' last hidden states.

    x_t(w) = sum_i w_i W_i h_it        nats(w) = -1/T sum_t log softmax(x_t(w))[y_t]

log-sum-exp of a linear function is convex, so the negative log-likelihood is convex in the weights w. With p_t =
softmax(x_t(w)) and l_it = W_i h_it its derivatives are

    d/dw_i       1/T sum_t E_{p_t}[l_it] - l_it[y_t]
    d2/dw_i dw_j 1/T sum_t Cov_{p_t}(l_it, l_jt)

which `kernels.fused_head` computes in chunks of the vocabulary: hidden states are kept, logits never. Each member reads
every text once by forced decoding; other weights cost the output layers alone.

The end of a text. decode.score counts any stop token, log sum_s p(s), a difference of two convex functions. Here the
end is one token, so that the sum stays convex: the one of the ensemble's stop tokens that is most likely over all ends
(`with_end`). With one stop token the two are the same.

    T positions of all texts  S texts  D width of a member  V vocabulary  N members  G target tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from decode.engine.ensemble import Ensemble
from decode.engine.generate import score
from decode.fitting.newton import Array, Point
from decode.pipeline.output import DecodeProgress
from kernels import FusedHead, describe_flag, fused_head

# Positions whose moments exist at once: 80 MB with five members and a vocabulary of 128,256.
POSITIONS_AT_ONCE = 4096
# In place of a weight of zero, for which `fused_head` would give no moments: no float32 sum of logits changes by it.
TINY_WEIGHT = 1e-30
END = -1


@dataclass(frozen=True)
class HiddenStates:
    """hidden: (T, D_i) of each member.   output: its output layer (V, D_i), of the same dtype.   token_T: the next
    token at each position; at the end of a text END, until `with_end`.   text_T: each position's text, ascending.
    """

    names: tuple[str, ...]
    hidden: tuple[Tensor, ...]
    output: tuple[Tensor, ...]
    token_T: Tensor
    text_T: Tensor
    texts: int
    stops: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.token_T)

    def select(self, positions: slice | Tensor) -> "HiddenStates":
        """Some of the positions. positions: an index of (T,)."""
        hidden = tuple(hidden_TD[positions] for hidden_TD in self.hidden)
        return replace(self, hidden=hidden, token_T=self.token_T[positions], text_T=self.text_T[positions])

    def with_end(self, weights_N: Array) -> tuple["HiddenStates", int | None]:
        """The same with a token in place of END, the most likely one under these weights, and that token."""
        if not self.stops:
            return self, None
        ends_T, end = self.token_T == END, self.stops[0]
        if len(self.stops) > 1:
            ends = self.select(ends_T)
            stops_TG = torch.tensor([self.stops] * ends.tokens, device=ends_T.device)
            end = self.stops[int(ends.logprobs(weights_N, stops_TG).sum(dim=0).argmax())]
        return replace(self, token_T=self.token_T.masked_fill(ends_T, end)), end

    def logprobs(self, weights_N: Array, targets_TG: Tensor) -> Tensor:
        """(T, G) float64 on the host: log-probabilities in nats of target tokens at every position."""
        used = [number for number, weight in enumerate(weights_N) if weight] or [0]
        parts = [part.target_logprob for part in self._heads(weights_N, targets_TG, used, moments=False)]
        return torch.cat([part for part in parts if part is not None]).double().cpu()

    def nats(self, weights_N: Array) -> Array:
        """(S,) negative log-likelihoods of the texts."""
        return self._by_text(-self.logprobs(weights_N, self.token_T[:, None]))[:, 0]

    def mean_nats(self, weights_N: Array) -> float:
        """Negative log-likelihood per token."""
        return float(self.nats(weights_N).sum()) / self.tokens

    def derivatives(self, weights_N: Array) -> Array:
        """(S, 1 + N + N N): the texts' negative log-likelihoods in nats, their gradients and Hessians.

        Sums over positions are float64. Raises FloatingPointError for NaN or infinite logits.
        """
        terms = []
        for part in self._heads(weights_N, self.token_T[:, None], range(len(self.names)), moments=True):
            assert part.target_logprob is not None
            assert part.target_logits is not None
            assert part.mean is not None
            assert part.covariance is not None
            gradient_NT = part.mean.double() - part.target_logits[:, :, 0].double()
            covariance_TM = part.covariance.double().flatten(0, 1).T
            terms.append(torch.cat((-part.target_logprob.double(), gradient_NT.T, covariance_TM), dim=1).cpu())
        return self._by_text(torch.cat(terms))

    def objective(self, weights_N: Array) -> Point:
        """The function that is minimised: negative log-likelihood, nats per token. Logits are summed in float32, to
        which the weights are rounded.
        """
        weights_N = weights_N.astype(np.float32).astype(np.float64)
        value_1, gradient_N, hessian_M = np.split(
            self.derivatives(weights_N).sum(axis=0) / self.tokens, (1, 1 + len(weights_N))
        )
        return Point(weights_N, float(value_1[0]), gradient_N, hessian_M.reshape(len(weights_N), -1))

    def _heads(
        self, weights_N: Array, targets_TG: Tensor, members: Sequence[int], moments: bool
    ) -> Iterator[FusedHead]:
        weights = [float(weights_N[number]) or TINY_WEIGHT for number in members]
        output = [self.output[number] for number in members]
        for start in range(0, self.tokens, POSITIONS_AT_ONCE):
            here = slice(start, start + POSITIONS_AT_ONCE)
            hidden = [self.hidden[number][here] for number in members]
            part = fused_head(hidden, output, weights, targets=targets_TG[here], moments=moments)
            if bool((part.flag != 0).any()):
                flag = next(flag for flag in part.flag.tolist() if flag)
                raise FloatingPointError(describe_flag(flag, [self.names[number] for number in members]))
            yield part

    def _by_text(self, values_TK: Tensor) -> Array:
        sums_SK = torch.zeros(self.texts, values_TK.shape[1], dtype=torch.float64)
        return sums_SK.index_add_(0, self.text_T.cpu(), values_TK).numpy()


def hidden_states(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    targets: Sequence[list[int]],
    batch_size: int = 16,
    output: Sequence[Tensor] | None = None,
) -> HiddenStates:
    """Let every member read each prompt and its text (token ids, without a stop token).

    Hidden states are moved to the ensemble's device, in the dtype of the output layer. output: the output layers of
    earlier hidden states of this ensemble. Raises what `score` does.
    """
    output = output or [member.model.output_matrix().to(ensemble.device) for member in ensemble.members]
    found: list[tuple[Tensor, ...]] = [()] * len(targets)
    progress = DecodeProgress(len(targets))
    try:
        for index, completion in score(ensemble, prompts, targets, batch_size, keep_hidden=True):
            pairs = zip(completion.hidden, output, strict=True)
            found[index] = tuple(hidden_TD.to(ensemble.device, output_VD.dtype) for hidden_TD, output_VD in pairs)
            progress.add(len(found[index][0]))
    finally:
        progress.stop()
    stops = tuple(sorted(ensemble.stop_tokens))
    texts = [[*target, END] if stops else target for target in targets]
    return HiddenStates(
        ensemble.names,
        tuple(torch.cat(parts) for parts in zip(*found)),
        tuple(output),
        torch.tensor([token for text in texts for token in text], device=ensemble.device),
        torch.tensor([index for index, text in enumerate(texts) for _ in text], device=ensemble.device),
        len(texts),
        stops,
    )
