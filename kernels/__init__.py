"""Kernels of the decoding step (the weighted sum of logits, packed linear layers) and of the training loss.

    from kernels import fused_logits
    result = fused_logits([logits_l, logits_s], torch.tensor([1.0, 0.5]))
    result.token, result.logprob, result.flag

`dispatch.py` picks the implementation. Triton is imported at its first use: a machine without it can use the rest.
"""

from kernels.cpu.packed_linear import PackedLinear
from kernels.dispatch import backend, fused_head, fused_logits, linear_cross_entropy
from kernels.types import FusedHead, FusedLogits, Sampling, describe_flag

__all__ = [
    "FusedHead",
    "FusedLogits",
    "PackedLinear",
    "Sampling",
    "backend",
    "describe_flag",
    "fused_head",
    "fused_logits",
    "linear_cross_entropy",
]
