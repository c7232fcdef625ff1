"""What is asked of the family and what comes back: the request, the result, the flags.

Every backend (Triton, CPU, eager) receives the same checked `Request` and fills the same `FusedLogits`, so the checks
stand here once. This file knows no arithmetic.

    B rows (sequences)  T drafted tokens a row  R = B * (T + 1) rows of logits  V vocabulary  N members  G given tokens
    K best
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

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
    """A checked request: logits N tensors (R, V), weights (N,) or (N, B) float32; row r belongs to sequence r //
    every.
    """

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


@dataclass(frozen=True)
class FusedHead:
    """Results of the fused output layers, one entry a row; a flagged row has token -1 and NaN in every float result.

    token (R,) int64, logprob (R,) float32 nats, flag (R,) int32;   given_logprob (R, G) float32, NaN outside 0 .. V-1.
    With moments: mean (N, R) and covariance (N, N, R) float32 of the members' logits under the combined distribution,
    and given_logits (N, R, G) float32, the members' own logits of the given tokens.
    """

    token: Tensor
    logprob: Tensor
    flag: Tensor
    given_logprob: Tensor | None = None
    given_logits: Tensor | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None
    workspace: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class HeadRequest:
    """A checked request: hidden N tensors (R, D_i), output N tensors (V, D_i), weights (N,) or (N, R) float32."""

    hidden: tuple[Tensor, ...]
    output: tuple[Tensor, ...]
    weights: Tensor
    given: Tensor | None = None
    moments: bool = False

    @property
    def rows(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def vocabulary(self) -> int:
        return self.output[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    def weights_NR(self) -> Tensor:
        return self.weights if self.weights.dim() == 2 else self.weights[:, None].expand(-1, self.rows)


def check_weights(weights: Tensor | Sequence[float], members: int, batch: int, device: torch.device) -> Tensor:
    """(N,) or (N, B) float32 on `device`. On a GPU a tensor's values are not looked at: that would wait for it."""
    if not isinstance(weights, Tensor):
        if any(
            not math.isfinite(w) or w == 0 for row in weights for w in (row if isinstance(row, Sequence) else [row])
        ):
            raise ValueError(f"weights must be finite and not zero, found {list(weights)}")
        weights = torch.tensor(weights, dtype=torch.float32, device=device)
    elif not weights.is_cuda and (not torch.isfinite(weights).all() or (weights == 0).any()):
        raise ValueError(f"weights must be finite and not zero, found {weights.tolist()}")
    if tuple(weights.shape) not in {(members,), (members, batch)}:
        raise ValueError(f"weights must be ({members},) or ({members}, {batch}), found {tuple(weights.shape)}")
    if weights.dtype != torch.float32 or weights.device != device:
        raise ValueError(f"weights must be float32 on {device}, found {weights.dtype} on {weights.device}")
    return weights


def check_sampling(sample: Sampling, batch: int, device: torch.device) -> Sampling:
    """The same with tensors throughout: seed (1,), temperature (B,)."""
    for name, tensor in (("row_id", sample.row_id), ("position", sample.position)):
        if tuple(tensor.shape) != (batch,) or tensor.dtype != torch.int64 or tensor.device != device:
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be ({batch},) int64 on {device}, found {found}")
    if sample.top_k < 0 or not 0 < sample.top_p <= 1:
        raise ValueError(f"top_k must be 0 or more and top_p above 0 up to 1, found {sample.top_k} and {sample.top_p}")
    seed, temperature = sample.seed, sample.temperature
    if not isinstance(seed, Tensor):
        seed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=device)
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        temperature = torch.full((batch,), temperature, dtype=torch.float32, device=device)
    return replace(sample, seed=seed, temperature=temperature)


def check_head(
    hidden: Sequence[Tensor], output: Sequence[Tensor], given: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Shapes, dtypes and devices of hidden states (R, D_i), output layers (V, D_i) and given tokens (R, G)."""
    hidden, output = tuple(hidden), tuple(output)
    if not 1 <= len(hidden) <= MAX_MEMBERS or len(output) != len(hidden):
        raise ValueError(
            f"1 to {MAX_MEMBERS} members with one output layer each, found {len(hidden)} and {len(output)}"
        )
    rows, vocabulary, device = hidden[0].shape[0], output[0].shape[0], hidden[0].device
    for number, (hidden_RD, output_VD) in enumerate(zip(hidden, output, strict=True)):
        if hidden_RD.dim() != 2 or output_VD.dim() != 2 or hidden_RD.numel() == 0 or output_VD.numel() == 0:
            raise ValueError(f"member {number}: expected (R, D) and (V, D), found {hidden_RD.shape}, {output_VD.shape}")
        if hidden_RD.shape != (rows, output_VD.shape[1]) or output_VD.shape[0] != vocabulary:
            raise ValueError(
                f"member {number}: hidden {tuple(hidden_RD.shape)} and output {tuple(output_VD.shape)} do not fit "
                f"{rows} rows and {vocabulary} entries"
            )
        if hidden_RD.device != device or output_VD.device != device or hidden_RD.dtype != output_VD.dtype:
            raise ValueError(
                f"member {number}: hidden is {hidden_RD.dtype} on {hidden_RD.device}, its output layer "
                f"{output_VD.dtype} on {output_VD.device}; expected one dtype and {device}"
            )
    if given is not None:
        given = given[:, None] if given.dim() == 1 else given
        if given.dim() != 2 or given.shape[0] != rows or not 1 <= given.shape[1] <= MAX_GIVEN:
            raise ValueError(f"given must be ({rows},) or ({rows}, 1 to {MAX_GIVEN}), found {tuple(given.shape)}")
        given = check_tokens(given, device, "given")
    return hidden, output, given


def check_tokens(tokens: Tensor, device: torch.device, name: str) -> Tensor:
    """int64 on `device`, contiguous."""
    if tokens.dtype != torch.int64 or tokens.device != device:
        raise ValueError(f"{name} must be int64 on {device}, found {tokens.dtype} on {tokens.device}")
    return tokens.contiguous()


def copy_into(out: Any, result: Any) -> Any:
    """`out` with its tensors overwritten by those of a result like it, for a caller that keeps addresses fixed."""
    for field in fields(out):
        ours, theirs = getattr(out, field.name), getattr(result, field.name)
        if isinstance(ours, Tensor):
            ours.copy_(theirs)
        elif isinstance(ours, FusedLogits):
            copy_into(ours, theirs)
    return out


def check_logits(logits: Sequence[Tensor], dims: int) -> tuple[Tensor, ...]:
    """N tensors of one shape, each row contiguous."""
    logits = tuple(logits)
    if not 1 <= len(logits) <= MAX_MEMBERS:
        raise ValueError(f"1 to {MAX_MEMBERS} members, found {len(logits)}")
    first = logits[0]
    if first.dim() != dims or first.numel() == 0 or first.shape[-1] > MAX_VOCABULARY:
        raise ValueError(
            f"logits must have {dims} dimensions, none of them empty, V <= {MAX_VOCABULARY:,}: {first.shape}"
        )
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
