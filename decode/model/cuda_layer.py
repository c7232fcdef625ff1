"""A prepared layer on a GPU: the same function in fewer launches (kernels/triton/layer.py, gemv.py,
attention.py).

A step of few rows reads the weights and starts kernels, and with PyTorch's operations the starts take longer. Several
rows take 10 launches a layer: four products, two norms (one takes the first addition to the residual stream along), the
rotation with what goes to the cache, attention, the gate, the second addition. One row takes five (unless its member is
split, or bits must not depend on the batch): what stands around a product is part of it, and attention. Between them
numbers are kept in the weights' dtype, where PreparedLayer goes through float32; the residual stream is float32.
"""

# R positions  D model width  K key/value heads  G query heads of each  C head width

import torch
from torch import Tensor

from decode.model.batch import Pass, RowsPass
from decode.model.packed_llama import TAIL, Norm, PlainLinear, PreparedLayer, PreparedLlama, Stream
from kernels.triton import attention as attend_triton
from kernels.triton import layer as layer_triton
from kernels.triton.gemv import NormBefore, RopeAfter, gemv
from minillama.model import Layer, RMSNorm


class GpuLinear(PlainLinear):
    def product(self, x_RD: Tensor) -> Tensor:
        if len(x_RD) == 1 and not self.tile:  # other bits than in a product of several rows
            return gemv(x_RD, self.weight_OD, self.bias_O)
        return super().product(x_RD)


class GpuNorm(Norm):
    """In the dtype of the norm's weights, which the product behind it reads."""

    def __init__(self, norm: RMSNorm, storage: str) -> None:
        self.before = NormBefore(norm.weight.detach().float(), norm.eps)
        self.dtype = norm.weight.dtype

    def __call__(self, stream_RE: Tensor) -> Tensor:
        return self.of(stream_RE[:, :-TAIL])

    def of(self, x_RD: Tensor, delta_RD: Tensor | None = None) -> Tensor:
        """Of the stream's rows, after delta is added to them in place."""
        return layer_triton.add_rms_norm(x_RD, self.before.scale_D, self.before.epsilon, self.dtype, delta_RD)


class GpuLayer(PreparedLayer):
    input_norm: GpuNorm
    post_norm: GpuNorm

    def __init__(self, layer: Layer, model: PreparedLlama) -> None:
        super().__init__(layer, model)
        self.heads = self.groups * self.kv_heads, self.kv_heads

    def __call__(self, stream: Stream, positions: Pass, number: int, entries_PJ: Tensor) -> None:
        x_RD = stream.own_RD
        # Without what PlainLinear does around them: the conversions.
        qkv, output, gate_up, down = (linear for linear in self.linears if isinstance(linear, GpuLinear))
        if len(x_RD) == 1 and self.part is None and not self.ordered:
            turn_C2 = torch.view_as_real(positions.turn_RHC)[0, 0]
            turned = RopeAfter(turn_C2, positions.slot_R, entries_PJ, *self.heads)
            q_RQ = gemv(x_RD, qkv.weight_OD, qkv.bias_O, norm=self.input_norm.before, rope=turned)
            gemv(
                self._attended(q_RQ, positions, number, entries_PJ), output.weight_OD, output.bias_O, add_to=x_RD
            )
            h_RF = gemv(x_RD, gate_up.weight_OD, gate_up.bias_O, norm=self.post_norm.before, gated=True)
            gemv(h_RF, down.weight_OD, down.bias_O, add_to=x_RD)
            return
        h_RD = self.input_norm.of(x_RD)
        q_RQ = layer_triton.rope_and_cache(
            qkv.product(h_RD), positions.turn_RHC, positions.slot_R, entries_PJ, *self.heads
        )
        attended_RD = self.summed(output.product(self._attended(q_RQ, positions, number, entries_PJ)))
        h_RD = self.post_norm.of(x_RD, attended_RD)
        x_RD += self.summed(down.product(layer_triton.silu_and_mul(gate_up.product(h_RD))))

    def _attended(self, q_RQ: Tensor, positions: Pass, number: int, entries_PJ: Tensor) -> Tensor:
        # Under `invariant` prompts too: PyTorch's attention adds in an order of its own for each shape.
        if self.ordered or isinstance(positions, RowsPass):
            at = positions.slot_R, positions.capacity
            return attend_triton.decode_attention(q_RQ, entries_PJ, *at, self.kv_heads, self.head_dim)
        q_RGKC = q_RQ.view(-1, self.groups, self.kv_heads, self.head_dim)
        out_RGKC = torch.empty_like(q_RGKC)
        self.attend(q_RGKC.transpose(1, 2), positions, number, out_RGKC.transpose(1, 2))
        return out_RGKC.view(q_RQ.shape)
