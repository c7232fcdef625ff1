"""A prepared layer on a GPU: the same function in fewer launches (kernels/layer_triton.py).

A step of few rows reads the weights and starts kernels, and with PyTorch's operations the starts take longer: 32 a
layer, five of them products. Here they are 11: two norms (one takes the first addition to the residual stream along),
the rotation with what goes to the cache, attention, the gate, the second addition, and the products. Between them
numbers are kept in the weights' dtype, where PreparedLayer goes through float32; the residual stream is float32.
"""

# R positions  D model width  K key/value heads  G query heads of each  C head width

from torch import Tensor

from decode.prepare import TAIL, Pass, PlainLinear, PreparedLayer, PreparedLlama
from kernels import layer_triton
from minillama.model import Layer


class GpuLayer(PreparedLayer):
    def __init__(self, layer: Layer, model: PreparedLlama) -> None:
        super().__init__(layer, model)
        # Without what PlainLinear does around them: the conversions.
        self.products = [linear.product for linear in self.linears if isinstance(linear, PlainLinear)]
        self.dtype = layer.mlp.gate_proj.weight.dtype
        self.epsilon = layer.input_layernorm.eps
        self.input_scale_D = layer.input_layernorm.weight.detach().float()
        self.post_scale_D = layer.post_attention_layernorm.weight.detach().float()

    def __call__(self, stream_RE: Tensor, positions: Pass, number: int, entries_PJ: Tensor) -> None:
        qkv, output, gate, up, down = self.products
        x_RD = stream_RE[:, :-TAIL]
        h_RD = layer_triton.normed(x_RD, self.input_scale_D, self.epsilon, self.dtype)
        heads = self.groups * self.kv_heads, self.kv_heads
        q_RQ = layer_triton.turned_and_stored(qkv(h_RD), positions.turn_RHC, positions.slot_R, entries_PJ, *heads)
        q_RGKC = q_RQ.view(-1, self.groups, self.kv_heads, self.head_dim)
        attended_RD = self.summed(output(self.attend(q_RGKC.transpose(1, 2), positions, number)))
        h_RD = layer_triton.normed(x_RD, self.post_scale_D, self.epsilon, self.dtype, attended_RD)
        x_RD += self.summed(down(layer_triton.silu_multiplied(gate(h_RD), up(h_RD))))
