"""Arguments and results shared by all backends of `fused_logits` and `fused_head`, the flags, and all checks.

Every backend (Triton, CPU, eager) receives the same checked request and fills the same result.

    B sequences  V vocabulary  N members  G target tokens  K best  D model width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MAX_MEMBERS = 8
MAX_TOP_K = 32
MAX_TARGETS = 64
MAX_VOCABULARY = 262_144
# On every backend sums are formed inside a split of the vocabulary first, then over the splits, so a sequence's bits
# cannot depend on the others in the batch.
SPLIT = 4096

# A flag is kind * 16 + member number + 1 (0 where no member is to blame); of several, the largest is kept.
ALL_MASKED, OVERFLOW, INFINITE, NAN = 1, 2, 3, 4
_KINDS = {
    ALL_MASKED: "every token is masked",
    OVERFLOW: "the weighted sum leaves float32's range at {}",
    INFINITE: "+inf in the logits of {}",
    NAN: "NaN in the logits of {}",
}


def describe_flag(flag: int, names: Sequence[str] | None = None) -> str:
    """One line for a flag of `FusedLogits.flag`; `names` are the members' names in order. '' for 0."""
    kind, member = divmod(int(flag), 16)
    if kind == 0:
        return ""
    return _KINDS[kind].format(f"member {member - 1}" if names is None or member == 0 else names[member - 1])


@dataclass(frozen=True)
class Sampling:
    """How to sample. A sample depends on (seed, row_id, position) and on the sequence's own logits, on nothing else.

    Each parameter is one number for all sequences or a tensor (B,) with one for each.
    seed: int64.   row_id, position: (B,) int64 within 0 .. 2**31 - 1.   temperature: float32, 0 or more; 0 is greedy.
    top_k: int64; a token is kept if fewer than top_k are strictly more probable; 0 keeps all.
    top_p: float32 or float64, above 0 up to 1; a token is kept if those strictly more probable have a mass below top_p
    at that temperature; 1 keeps all. A token must pass both; tokens of equal probability are kept or dropped together.
    On a GPU the values of a tensor are not looked at: tensors for top_k or top_p cost the search for what is kept, the
    numbers 0 and 1 do not. Inside a CUDA graph give tensors for what changes between replays.
    """

    seed: Tensor | int
    row_id: Tensor
    position: Tensor
    temperature: Tensor | float = 1.0
    top_k: Tensor | int = 0
    top_p: Tensor | float = 1.0

    @property
    def truncated(self) -> bool:
        """Whether top_k or top_p may drop a token of some sequence."""
        return _may_hold(self.top_k, lambda top_k: top_k != 0) or _may_hold(self.top_p, lambda top_p: top_p != 1)


@dataclass(frozen=True)
class SamplingTensors:
    """A checked `Sampling`: tensors (B,) on the device of the logits; no top_k and top_p where nothing is truncated."""

    seed: Tensor
    row_id: Tensor
    position: Tensor
    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None


@dataclass(frozen=True)
class FusedLogits:
    """Results, one entry a sequence. A flagged sequence has token -1 and NaN in every float result.

    token (B,) int64, logprob (B,) float32 nats, flag (B,) int32; the others are None unless requested:
    member_logprob (N, B) float32: each member's own log-probability of `sample_token` if a sample is requested, else of
    `token`; NaN where the member's weight is 0.   member_target_logprob (N, B, G) float32: the same of the targets.
    top_token, top_logprob (B, K): best first, lowest index first on ties, -1 and -inf after the last unmasked token.
    target_logprob (B, G) float32: NaN where the target is outside 0 .. V-1.
    sample_token (B,) int64, sample_logprob (B,) float32: of the untempered, untruncated distribution, like `logprob`.
    """

    token: Tensor
    logprob: Tensor
    flag: Tensor
    member_logprob: Tensor | None = None
    member_target_logprob: Tensor | None = None
    top_token: Tensor | None = None
    top_logprob: Tensor | None = None
    target_logprob: Tensor | None = None
    sample_token: Tensor | None = None
    sample_logprob: Tensor | None = None
    workspace: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Request:
    """The checked arguments of `fused_logits`: logits (B, V) of N members, weights (N,) or (N, B), targets (B, G)."""

    logits: tuple[Tensor, ...]
    weights: Tensor
    members: bool = False
    top_k: int = 0
    targets: Tensor | None = None
    sample: SamplingTensors | None = None

    @property
    def batch(self) -> int:
        return self.logits[0].shape[0]

    @property
    def vocabulary(self) -> int:
        return self.logits[0].shape[1]

    @property
    def weights_NB(self) -> Tensor:
        """The weights with one column a sequence (a view where they are shared)."""
        return self.weights if self.weights.dim() == 2 else self.weights[:, None].expand(-1, self.batch)

    @cached_property
    def left_out_NB(self) -> Tensor | None:
        """Where a weight of zero leaves a member out of a sequence; None if nowhere. Waits for the device."""
        left_out_NB = self.weights_NB == 0
        return left_out_NB if left_out_NB.any() else None


@dataclass(frozen=True)
class FusedHead:
    """Results of the output layers, one entry a sequence; a flagged one has token -1 and NaN in every float result.

    token (B,) int64, logprob (B,) float32 nats, flag (B,) int32; target_logprob (B, G) float32, NaN outside 0 .. V-1.
    With moments, float32: mean (N, B) and covariance (N, N, B) of the members' logits under the combined distribution,
    and target_logits (N, B, G), the members' own logits of the targets.
    """

    token: Tensor
    logprob: Tensor
    flag: Tensor
    target_logprob: Tensor | None = None
    target_logits: Tensor | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None


def check_logits(logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """N tensors of one shape (B, V), each row contiguous."""
    logits = tuple(logits)
    if not 1 <= len(logits) <= MAX_MEMBERS:
        raise ValueError(f"1 to {MAX_MEMBERS} members, found {len(logits)}")
    first = logits[0]
    if first.dim() != 2 or first.numel() == 0 or first.shape[1] > MAX_VOCABULARY:
        raise ValueError(f"logits must be (B, V), not empty, V <= {MAX_VOCABULARY:,}, found {tuple(first.shape)}")
    for number, logits_BV in enumerate(logits):
        name = f"logits of member {number}"
        _check(name, logits_BV, first.shape, first.device, torch.float32, torch.bfloat16, torch.float16)
        if logits_BV.shape[1] > 1 and logits_BV.stride(1) != 1:
            raise ValueError(f"{name} have stride {logits_BV.stride(1)} along V, expected 1")
    return logits


def check_weights(
    weights: Tensor | Sequence[Any], members: int, batch: int, device: torch.device, may_be_zero: bool = True
) -> Tensor:
    """(N,) or (N, B) float32 on `device`, finite, not all zero for a sequence; not zero at all unless `may_be_zero`.

    Shared weights of which one is 0 become (N, B). The values of a tensor on a GPU are not looked at: that would wait.
    """
    values = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float32)
    if tuple(values.shape) not in {(members,), (members, batch)}:
        raise ValueError(f"weights must be ({members},) or ({members}, {batch}), found {tuple(values.shape)}")
    if isinstance(weights, Tensor):
        _check("weights", weights, weights.shape, device, torch.float32)
    if values.is_cuda:
        return values
    zero = values == 0
    if not torch.isfinite(values).all() or (zero.all(dim=0) if may_be_zero else zero).any():
        rule = "must not all be zero for a sequence" if may_be_zero else "must not be zero"
        raise ValueError(f"weights must be finite and {rule}, found {values.tolist()}")
    if values.dim() == 1 and zero.any():
        values = values[:, None].repeat(1, batch)
    return values.to(device)


def check_targets(targets: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    """(B, G) int64 on `device`, contiguous, from (B,) or (B, G)."""
    if targets is None:
        return None
    targets = targets[:, None] if targets.dim() == 1 else targets
    if targets.dim() != 2 or targets.shape[0] != batch or not 1 <= targets.shape[1] <= MAX_TARGETS:
        raise ValueError(f"targets must be ({batch},) or ({batch}, 1 to {MAX_TARGETS}), found {tuple(targets.shape)}")
    _check("targets", targets, targets.shape, device, torch.int64)
    return targets.contiguous()


def check_head(hidden: Sequence[Tensor], output: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Shapes, dtypes and devices of hidden states (B, D_i) and output layers (V, D_i)."""
    hidden, output = tuple(hidden), tuple(output)
    if not 1 <= len(hidden) <= MAX_MEMBERS or len(output) != len(hidden):
        raise ValueError(f"1 to {MAX_MEMBERS} members, one output layer each, found {len(hidden)} and {len(output)}")
    for number, (hidden_BD, output_VD) in enumerate(zip(hidden, output, strict=True)):
        shape = output[0].shape[0], hidden_BD.shape[-1]
        _check(f"output layer of member {number}", output_VD, shape, hidden[0].device, hidden_BD.dtype)
        shape = hidden[0].shape[0], output_VD.shape[-1]
        _check(f"hidden states of member {number}", hidden_BD, shape, hidden[0].device, output_VD.dtype)
        if hidden_BD.numel() == 0 or output_VD.numel() == 0:
            raise ValueError(f"member {number}: hidden states or output layer are empty")
    return hidden, output


def check_sampling(sample: Sampling, batch: int, device: torch.device) -> SamplingTensors:
    """The same as tensors (B,) on `device`."""
    for name, value, wrong, rule in (
        ("temperature", sample.temperature, lambda t: (t < 0) | (t == math.inf) | (t != t), "0 or more"),
        ("top_k", sample.top_k, lambda k: k < 0, "0 or more"),
        ("top_p", sample.top_p, lambda p: (p <= 0) | (p > 1) | (p != p), "above 0, up to 1"),
    ):
        if not _on_gpu(value) and _may_hold(value, wrong):
            raise ValueError(f"{name} must be {rule}, found {value.tolist() if isinstance(value, Tensor) else value}")

    def tensor(name: str, value: Tensor | float, *dtypes: torch.dtype) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((batch,), value, dtype=dtypes[0], device=device)
        _check(name, value, (batch,), device, *dtypes)
        return value.contiguous()

    seed = sample.seed if isinstance(sample.seed, Tensor) else (sample.seed + 2**63) % 2**64 - 2**63
    # A number keeps float64 on a CPU, where it is compared with masses in float64.
    fraction = (torch.float64, torch.float32) if device.type == "cpu" else (torch.float32, torch.float64)
    return SamplingTensors(
        seed=tensor("seed", seed, torch.int64),
        row_id=tensor("row_id", sample.row_id, torch.int64),
        position=tensor("position", sample.position, torch.int64),
        temperature=tensor("temperature", sample.temperature, torch.float32),
        top_k=tensor("top_k", sample.top_k, torch.int64) if sample.truncated else None,
        top_p=tensor("top_p", sample.top_p, *fraction) if sample.truncated else None,
    )


def copy_into(out: Any, result: Any) -> Any:
    """`out` with its tensors overwritten by those of a result like it."""
    for name, values in vars(out).items():
        if isinstance(values, Tensor):
            values.copy_(getattr(result, name))
    return out


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless the tensor has this shape and device and one of the dtypes."""
    if tensor.shape != shape or tensor.device != device or tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {tuple(shape)} {expected} on {device}, found {found}")


def _on_gpu(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _may_hold(value: Tensor | float, test: Callable[[Any], Any]) -> bool:
    """Whether the test is true of a value; a tensor on a GPU is not looked at."""
    return _on_gpu(value) or bool(torch.any(test(value)) if isinstance(value, Tensor) else test(value))
