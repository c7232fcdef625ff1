"""What is asked of the family and what comes back: the request, the result, the flags.

Every backend (Triton, CPU, eager) receives the same checked `Request` and fills the same `FusedLogits`, so the checks
stand here once. This file knows no arithmetic.

    B rows (sequences)  T drafted tokens a row  R = B * (T + 1) rows of logits  V vocabulary  N members  G given tokens
    K best
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_MEMBERS = 8
MAX_TOP_K = 16
MAX_GIVEN = 64
MAX_VOCABULARY = 262_144
# The vocabulary is split here and nowhere else, on every backend: sums are formed inside a split first, then over the
# splits, so a row's bits cannot depend on the other rows.
SPLIT = 4096

# A flag is kind * 16 + member number + 1 (0 where no member is to blame); of several, the largest is kept.
EMPTY, RANGE, INFINITE, NAN = 1, 2, 3, 4
_KINDS = {
    RANGE: "the weighted sum leaves float32's range at {}",
    INFINITE: "+inf in the logits of {}",
    NAN: "NaN in the logits of {}",
}


def describe_flag(flag: int, names: Sequence[str] | None = None) -> str:
    """One line for a flag of `FusedLogits.flag`; `names` are the members' names in order. '' for 0."""
    kind, member = divmod(int(flag), 16)
    if kind == 0:
        return ""
    if kind == EMPTY:
        return "every token is masked"
    name = names[member - 1] if names is not None else f"member {member - 1}"
    return _KINDS[kind].format(name)


@dataclass(frozen=True)
class Sampling:
    """How to draw. The draw is a function of (seed, row id, position) and of the row's own logits, of nothing else.

    seed: int64 tensor (1,), or an int.   row_id, position: (B,) int64, each within 0 .. 2**31 - 1.
    temperature: float or (B,) float32, above 0.   top_k: keep a token if fewer than top_k are strictly more probable;
    0 keeps all.   top_p: keep a token if those strictly more probable have a mass below top_p at that temperature; 1.0
    keeps all. Tokens of equal probability are kept or dropped together; a token must pass both.
    Inside a CUDA graph give tensors: a number is baked in, and the graph would repeat its draws.
    """

    seed: Tensor | int
    row_id: Tensor
    position: Tensor
    temperature: Tensor | float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True)
class FusedLogits:
    """Results, one entry a row. A flagged row has token -1 and NaN in every float result.

    token (B,) int64, logprob (B,) float32 nats, flag (B,) int32; the others are None unless asked for:
    member_logprob (N, B) float32, each member's own log-probability of `token`;
    top_token, top_logprob (B, K), best first, lowest index first on ties, -1 and -inf past the last unmasked token;
    entropy (B,) float32 nats;   given_logprob (B, G) float32, NaN where the given token is outside 0 .. V-1;
    sample_token (B,) int64, sample_logprob (B,) float32: of the untempered, untruncated distribution, like `logprob`.
    """

    token: Tensor
    logprob: Tensor
    flag: Tensor
    member_logprob: Tensor | None = None
    top_token: Tensor | None = None
    top_logprob: Tensor | None = None
    entropy: Tensor | None = None
    given_logprob: Tensor | None = None
    sample_token: Tensor | None = None
    sample_logprob: Tensor | None = None
    workspace: tuple[Tensor, ...] = ()

    def copy_(self, other: FusedLogits) -> FusedLogits:
        """Overwrites this result's tensors with the other's, for a caller that keeps addresses fixed."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                mine.copy_(theirs)
        return self


@dataclass(frozen=True)
class Verification:
    """Outcome of a verification, one entry a row of B.

    accepted (B,) int64: length of the longest drafted prefix that the combined argmax agrees with, 0 .. T.
    token (B,) int64, logprob (B,) float32: the combined argmax after that prefix, so accepted + 1 tokens are gained.
    flag (B,) int32: that of the position at which the prefix ended.   steps: all positions, results shaped (B * (T+1)).
    """

    accepted: Tensor
    token: Tensor
    logprob: Tensor
    flag: Tensor
    steps: FusedLogits


@dataclass(frozen=True)
class Request:
    """A checked request: logits N tensors (R, V), weights (N,) or (N, B) float32; row r belongs to sequence r // every."""

    logits: tuple[Tensor, ...]
    weights: Tensor
    members: bool = False
    top_k: int = 0
    entropy: bool = False
    given: Tensor | None = None
    sample: Sampling | None = None
    draft: Tensor | None = None
    every: int = 1

    @property
    def rows(self) -> int:
        return self.logits[0].shape[0]

    @property
    def vocabulary(self) -> int:
        return self.logits[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.logits[0].device

    def weights_NR(self) -> Tensor:
        """The weights with one column a row of logits (a view where they are shared)."""
        if self.weights.dim() == 1:
            return self.weights[:, None].expand(-1, self.rows)
        return self.weights.repeat_interleave(self.every, dim=1) if self.every > 1 else self.weights


def check_weights(weights: Tensor | Sequence[float], members: int, batch: int, device: torch.device) -> Tensor:
    """(N,) or (N, B) float32 on `device`. On a GPU a tensor's values are not looked at: that would wait for it."""
    if not isinstance(weights, Tensor):
        if any(not math.isfinite(w) or w == 0 for row in weights for w in (row if isinstance(row, Sequence) else [row])):
            raise ValueError(f"weights must be finite and not zero, found {list(weights)}")
        weights = torch.tensor(weights, dtype=torch.float32, device=device)
    elif not weights.is_cuda and (not torch.isfinite(weights).all() or (weights == 0).any()):
        raise ValueError(f"weights must be finite and not zero, found {weights.tolist()}")
    if tuple(weights.shape) not in {(members,), (members, batch)}:
        raise ValueError(f"weights must be ({members},) or ({members}, {batch}), found {tuple(weights.shape)}")
    if weights.dtype != torch.float32 or weights.device != device:
        raise ValueError(f"weights must be float32 on {device}, found {weights.dtype} on {weights.device}")
    return weights


def check_logits(logits: Sequence[Tensor], dims: int) -> tuple[Tensor, ...]:
    """N tensors of one shape, each row contiguous."""
    logits = tuple(logits)
    if not 1 <= len(logits) <= MAX_MEMBERS:
        raise ValueError(f"1 to {MAX_MEMBERS} members, found {len(logits)}")
    first = logits[0]
    if first.dim() != dims or first.numel() == 0 or first.shape[-1] > MAX_VOCABULARY:
        raise ValueError(f"logits must have {dims} dimensions, none of them empty, V <= {MAX_VOCABULARY:,}: {first.shape}")
    for number, logits_V in enumerate(logits):
        if logits_V.shape != first.shape or logits_V.device != first.device:
            raise ValueError(
                f"logits of member {number} are {tuple(logits_V.shape)} on {logits_V.device}, "
                f"those of member 0 {tuple(first.shape)} on {first.device}"
            )
        if logits_V.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"logits of member {number} are {logits_V.dtype}, expected bfloat16, float16 or float32")
        if logits_V.shape[-1] > 1 and logits_V.stride(-1) != 1:
            raise ValueError(f"logits of member {number} have stride {logits_V.stride(-1)} along V, expected 1")
    return logits
