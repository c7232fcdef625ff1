"""The packed layer on a GPU: the same function in fewer launches (kernels/triton/layer.py, gemv.py, attention.py).

A step of few rows reads the weights and launches kernels, and with PyTorch's operations the launches take longer.
Several rows take 10 launches a layer: four matmuls, two norms (one includes the first residual addition), RoPE with the
cache write, attention, SwiGLU, the second residual addition. One row takes five (unless the member is sharded, or bits
must not depend on the batch): attention, and four matmuls that include the operations around them. Between kernels
activations have the weights' dtype, where PackedLayer goes through float32; the residual stream is float32.
"""

# R positions  D model width  K key/value heads  G query heads of each  C head width  Q all query channels
# F feed-forward width  P positions of a KV cache  J keys and values of a position

import torch
from torch import Tensor

from decode.model.batch import DecodeBatch, ForwardBatch
from decode.model.layer import TAIL, Norm, PackedLayer, Packing, PlainLinear, ResidualStream
from kernels.triton import attention
from kernels.triton import layer as layer_kernels
from kernels.triton.gemv import NormBefore, RopeAfter, gemv
from minillama.model import Layer, RMSNorm


class CudaLinear(PlainLinear):
    def matmul(self, x_RD: Tensor) -> Tensor:
        if len(x_RD) == 1 and not self.tile:  # other bits than in a matmul of several rows
            return gemv(x_RD, self.weight_OD, self.bias_O)
        return super().matmul(x_RD)


class CudaNorm(Norm):
    """In the dtype of the norm's weights, which the next matmul reads."""

    def __init__(self, norm: RMSNorm, weight_dtype: str) -> None:
        self.before = NormBefore(norm.weight.detach().float(), norm.eps)
        self.dtype = norm.weight.dtype

    def __call__(self, stream_RE: Tensor) -> Tensor:
        return self.of(stream_RE[:, :-TAIL])

    def of(self, x_RD: Tensor, delta_RD: Tensor | None = None) -> Tensor:
        """Of the residual stream, after delta is added to it in place."""
        return layer_kernels.add_rms_norm(x_RD, self.before.scale_D, self.before.epsilon, self.dtype, delta_RD)


class CudaLayer(PackedLayer):
    input_norm: CudaNorm
    post_norm: CudaNorm

    def __init__(self, layer: Layer, packing: Packing) -> None:
        super().__init__(layer, packing)
        self.heads = self.groups * self.kv_heads, self.kv_heads

    def __call__(self, stream: ResidualStream, batch: ForwardBatch, number: int, entries_PJ: Tensor) -> None:
        x_RD = stream.own_RD
        # `matmul` and the weights themselves: no conversions around them.
        qkv, output, gate_up, down = (linear for linear in self.linears if isinstance(linear, CudaLinear))
        if len(x_RD) == 1 and self.tp is None and not self.ordered:
            rope_C2 = torch.view_as_real(batch.rope_RHC)[0, 0]
            rope = RopeAfter(rope_C2, batch.slot_R, entries_PJ, *self.heads)
            q_RQ = gemv(x_RD, qkv.weight_OD, qkv.bias_O, norm=self.input_norm.before, rope=rope)
            attended_RQ = self._attention(q_RQ, batch, number, entries_PJ)
            gemv(attended_RQ, output.weight_OD, output.bias_O, add_to=x_RD)
            h_RF = gemv(x_RD, gate_up.weight_OD, gate_up.bias_O, norm=self.post_norm.before, gated=True)
            gemv(h_RF, down.weight_OD, down.bias_O, add_to=x_RD)
            return
        h_RD = self.input_norm.of(x_RD)
        q_RQ = layer_kernels.rope_and_cache(qkv.matmul(h_RD), batch.rope_RHC, batch.slot_R, entries_PJ, *self.heads)
        attended_RD = self.summed(output.matmul(self._attention(q_RQ, batch, number, entries_PJ)))
        h_RD = self.post_norm.of(x_RD, attended_RD)
        x_RD += self.summed(down.matmul(layer_kernels.silu_and_mul(gate_up.matmul(h_RD))))

    def _attention(self, q_RQ: Tensor, batch: ForwardBatch, number: int, entries_PJ: Tensor) -> Tensor:
        # Under `invariant` prompts too: PyTorch's attention sums in an order of its own for each shape.
        if self.ordered or isinstance(batch, DecodeBatch):
            at = batch.slot_R, batch.capacity
            return attention.decode_attention(q_RQ, entries_PJ, *at, self.kv_heads, self.head_dim)
        q_RGKC = q_RQ.view(-1, self.groups, self.kv_heads, self.head_dim)
        out_RGKC = torch.empty_like(q_RGKC)
        self.attend(q_RGKC.transpose(1, 2), batch, number, out_RGKC.transpose(1, 2))
        return out_RGKC.view(q_RQ.shape)
