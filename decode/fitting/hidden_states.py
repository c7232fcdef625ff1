"""What every member makes of given translations: the last hidden states of each place, kept, and their likelihood.

    x_t(w) = sum_i w_i W_i h_it        nats(w) = -1/T sum_t log softmax(x_t(w))[y_t]

log-sum-exp of a linear function is convex, so the negative log-likelihood is convex in the weights w. With p_t =
softmax(x_t(w)) and l_it = W_i h_it its derivatives are

    d/dw_i       1/T sum_t E_{p_t}[l_it] - l_it[y_t]
    d2/dw_i dw_j 1/T sum_t Cov_{p_t}(l_it, l_jt)

which `kernels.fused_head` gives in chunks of the vocabulary: hidden states are kept, logits never. Each member runs
once; another w costs the output layers alone.

The end. decode.score asks for any stop token, log sum_s p(s), a difference of two convex functions. Here the end is one
token, so that the sum stays convex: of the ensemble's stop tokens the one that is likeliest over all ends (`with_end`).
With one stop token the two are the same.

    T places of all texts  S texts  D width of a member  V vocabulary  N members
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decode.engine.ensemble import Ensemble
from decode.engine.likelihood import Given, read_given
from decode.pipeline.progress import DecodeProgress
from decode.engine.kv_slots import Rows
from kernels import FusedHead, describe_flag, fused_head

Array = NDArray[np.float64]

# Places whose moments exist at once: 80 MB with five members and a vocabulary of 128,256.
PLACES_AT_ONCE = 4096
# Stands for a weight of zero, whose member's moments are asked for all the same: no float32 sum of logits notices it.
NEXT_TO_NOTHING = 1e-30
END = -1


@dataclass(frozen=True)
class TeacherForced:
    """hidden: for each member (T, D_i).   output: its output layer (V, D_i), of the same dtype.   token_T: the next
    token of each place, END where a text ends and no token was chosen for that.   text_T: each place's text, ascending.
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

    def first(self, texts: int) -> "TeacherForced":
        """The first texts alone."""
        return self._places(slice(0, int((self.text_T < texts).sum())), texts)

    def after(self, texts: int) -> "TeacherForced":
        """What `first` leaves."""
        rest = self._places(slice(int((self.text_T < texts).sum()), self.tokens), self.texts - texts)
        return replace(rest, text_T=rest.text_T - texts)

    def thinned(self, tokens: int) -> "TeacherForced":
        """Every k-th place, about so many of them: a cheap likeness of the whole."""
        return self._places(slice(0, None, max(1, self.tokens // tokens)), self.texts)

    def joined(self, other: "TeacherForced") -> "TeacherForced":
        """These texts and behind them those of another reading by the same members."""
        hidden = tuple(torch.cat(pair) for pair in zip(self.hidden, other.hidden))
        token_T, text_T = torch.cat((self.token_T, other.token_T)), torch.cat((self.text_T, other.text_T + self.texts))
        return replace(self, hidden=hidden, token_T=token_T, text_T=text_T, texts=self.texts + other.texts)

    def _places(self, here: slice, texts: int) -> "TeacherForced":
        hidden = tuple(of_member[here] for of_member in self.hidden)
        return replace(self, hidden=hidden, token_T=self.token_T[here], text_T=self.text_T[here], texts=texts)

    def with_end(self, weights_N: Array) -> tuple["TeacherForced", int | None]:
        """The same with a token in place of END, the likeliest over all ends under these weights, and that token."""
        ends_T = self.token_T == END
        if not self.stops or not ends_T.any():
            return self, None
        end = self.stops[0]
        if len(self.stops) > 1:
            places = replace(self, hidden=tuple(of_member[ends_T] for of_member in self.hidden))
            logprob_TG = places.logprobs(
                weights_N, torch.tensor([self.stops] * int(ends_T.sum()), device=ends_T.device)
            )
            end = self.stops[int(logprob_TG.sum(dim=0).argmax())]
        return replace(self, token_T=self.token_T.masked_fill(ends_T, end)), end

    def logprobs(self, weights_N: Array, given_TG: Tensor) -> Tensor:
        """(T, G) float64 on the host: log-probabilities in nats of tokens given for every place."""
        used = [number for number, weight in enumerate(weights_N) if weight] or [0]
        found = [part.target_logprob for part in self._heads(weights_N, given_TG, used, moments=False)]
        return torch.cat([part for part in found if part is not None]).double().cpu()

    def nats(self, weights_N: Array) -> Array:
        """(S,) negative log-likelihoods of the texts."""
        return self._by_text(-self.logprobs(weights_N, self.token_T[:, None]))[:, 0]

    def likelihood(self, weights_N: Array) -> "Likelihood":
        """Value and derivatives. Weights are brought to float32, in which logits are summed; sums over places are
        float64. Raises FloatingPointError for NaN or infinite logits.
        """
        weights_N = np.asarray(weights_N, dtype=np.float32).astype(np.float64)
        members = len(self.names)
        places = []
        for part in self._heads(weights_N, self.token_T[:, None], range(members), moments=True):
            assert part.target_logprob is not None
            assert part.target_logits is not None
            assert part.mean is not None
            assert part.covariance is not None
            gradient_NT = part.mean.double() - part.target_logits[:, :, 0].double()
            covariance_TM = part.covariance.double().flatten(0, 1).T
            places.append(torch.cat((-part.target_logprob.double(), gradient_NT.T, covariance_TM), dim=1).cpu())
        nats_S, gradient_SN, hessian_SM = np.split(self._by_text(torch.cat(places)), (1, 1 + members), axis=1)
        return Likelihood(weights_N, self.tokens, nats_S[:, 0], gradient_SN, hessian_SM.reshape(-1, members, members))

    def _heads(self, weights_N: Array, given_TG: Tensor, members: Sequence[int], moments: bool) -> Iterator[FusedHead]:
        weights = [float(weights_N[number]) or NEXT_TO_NOTHING for number in members]
        output = [self.output[number] for number in members]
        for start in range(0, self.tokens, PLACES_AT_ONCE):
            here = slice(start, start + PLACES_AT_ONCE)
            hidden = [self.hidden[number][here] for number in members]
            part = fused_head(hidden, output, weights, targets=given_TG[here], moments=moments)
            if bool((part.flag != 0).any()):
                flag = next(flag for flag in part.flag.tolist() if flag)
                raise FloatingPointError(describe_flag(flag, [self.names[number] for number in members]))
            yield part

    def _by_text(self, values_TK: Tensor) -> Array:
        sums_SK = torch.zeros(self.texts, values_TK.shape[1], dtype=torch.float64)
        return sums_SK.index_add_(0, self.text_T.cpu(), values_TK).numpy()


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihoods of texts in nats, their gradients and Hessians: sums over a text's places.

    weights_N: the weights as they were used, float32's.
    """

    weights_N: Array
    tokens: int
    nats_S: Array
    gradient_SN: Array
    hessian_SNN: Array


def teacher_forced(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    targets: Sequence[list[int]],
    batch_size: int = 16,
    outputs: Sequence[Tensor] | None = None,
    quiet: bool = False,
) -> TeacherForced:
    """Run every member over each prompt and its text (token ids, without a stop token).

    Hidden states are moved to the ensemble's device, in the dtype in which a member multiplies them. outputs: the
    output layers of an earlier reading. Raises what `given_logprobs` does.
    """
    if outputs is None:
        outputs = [member.model.output_matrix().to(ensemble.device) for member in ensemble.members]
    kept: list[list[list[Tensor]]] = [[[] for _ in targets] for _ in outputs]

    def take(rows: Rows, asked: Sequence[tuple[Given, list[int]]], hidden: Sequence[Tensor]) -> None:
        counts = [len(new) for _, new in asked]
        for of_member, output_VD, hidden_RD in zip(kept, outputs, hidden):
            parts = hidden_RD.to(ensemble.device, output_VD.dtype).split(counts)
            for (given, new), part in zip(asked, parts):
                if new:
                    of_member[given.index].append(part.clone())

    progress = DecodeProgress(len(targets), quiet)
    try:
        for given in read_given(ensemble, prompts, targets, batch_size, take):
            progress.add(given.reached)
    finally:
        progress.stop()
    stops = tuple(sorted(ensemble.stop_tokens))
    texts = [[*target, END] if stops else target for target in targets]
    return TeacherForced(
        ensemble.names,
        tuple(torch.cat([part for parts in of_member for part in parts]) for of_member in kept),
        tuple(outputs),
        torch.tensor([token for text in texts for token in text], device=ensemble.device),
        torch.tensor([index for index, text in enumerate(texts) for _ in text], device=ensemble.device),
        len(texts),
        stops,
    )
