"""One layer of a Llama packed for inference, and its linear layers and norms in PyTorch's operations.

Everything is stored in the order in which the next operation reads it:
- RoPE pairs side by side, so that a rotation is one complex multiplication (queries and keys are permuted alike, so
  their dot products stay);
- query heads with the group first (G, K, C), so that the G heads that share a key head are rows of one matmul without
  a copy; the columns of the output projection are permuted to match;
- after every row of the residual stream the square root of D * epsilon: RMSNorm divides by the length of that longer
  vector, up to a factor that goes into the norm's weights, and those go into the next matmul where that costs no digit
  (float32). A norm is two operations.

A position's result has the same bits whatever else is in the batch (`invariant`): linear layers keep them, attention is
always G queries against the keys of one slot, and those are padded to a multiple of 64, where the library's sums have
one order (on a GPU it is our own kernel). A position of a prompt costs its own small matmul for that, which is little
beside the linear layers.
"""

# R positions of all sequences  E width of the residual stream with its tail  D model width  Q all query channels
# K key/value heads  G query heads of each  C head width  F feed-forward width  O outputs  P positions of a KV cache

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decode.model.batch import ForwardBatch
from kernels import PackedLinear
from minillama.model import Layer, RMSNorm
from minillama.tensor_parallel import TPGroup

# Floats after each row of the residual stream: the first makes its length that of RMSNorm, the others align the rows.
TAIL = 16
# Above this many elements PyTorch divides an operation among threads, at positions that are not the ends of rows: more
# rows are processed in blocks.
ONE_THREAD_ELEMENTS = 32_768
# Rows of every matmul on a GPU under `invariant`.
GPU_TILE_ROWS = 64


@dataclass(frozen=True)
class Packing:
    """How the weights of one model are held: see `PackedLlama`, and the types that fit its device.

    in_triton: norms, RoPE and attention are Triton kernels, whose attention reads only the filled positions of a slot.
    """

    weight_dtype: str
    invariant: bool
    in_triton: bool
    tp: TPGroup | None
    norm_type: type[Norm]
    linear_type: type[PlainLinear]

    def linear(self, weight_OD: Tensor, bias_O: Tensor | None, norm: Norm | None = None) -> Linear:
        """A linear layer in this weight dtype, with the weights of the norm before it where it takes them."""
        weight_OD = weight_OD.detach()
        if self.weight_dtype == "plain":
            return self.linear_type(weight_OD, bias_O, GPU_TILE_ROWS if self.invariant else 0)
        if norm is not None and norm.scale_D is None:
            weight_OD = weight_OD.float() * norm.folded_D
        return PackedLinear(weight_OD, bias_O, dtype=self.weight_dtype, invariant=self.invariant)


class ResidualStream:
    """The residual stream of a forward pass, (R, D) float32 with TAIL floats after each row, and views of it.

    It has the padding rows that the linear layers want from the beginning.
    """

    def __init__(self, first: PackedLayer, embedded_RD: Tensor, tail_E: Tensor, dtype: torch.dtype) -> None:
        rows, width = embedded_RD.shape
        padded = max(linear.fitting_rows(rows) for linear in first.linears)
        self.whole_RE = torch.empty(padded, width + TAIL, dtype=torch.float32, device=embedded_RD.device)
        self.x_RD = self.whole_RE[:, :-TAIL]
        self.own_RD = self.x_RD[:rows]  # without the padding
        self.own_RD.copy_(embedded_RD)
        if first.packing.in_triton:  # its norms read no tail
            return
        self.whole_RE[:, -TAIL:].copy_(tail_E.expand(padded, -1))
        self.x_RD[rows:].zero_()
        # The output of attention, with the padding that the output projection wants.
        self.attended_RQ = torch.zeros(padded, first.queries, dtype=dtype, device=embedded_RD.device)
        self.attended_RGKC = self.attended_RQ[:rows].view(rows, first.groups, first.kv_heads, first.head_dim)


class PackedLayer:
    """One transformer layer: two norms and four matmuls, queries, keys and values joined, gate and up joined."""

    def __init__(self, layer: Layer, packing: Packing) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.packing = packing
        self.tp, self.ordered = packing.tp, packing.invariant
        self.kv_heads, self.head_dim = attention.kv_heads, attention.head_dim
        self.groups = attention.heads // attention.kv_heads
        self.queries = attention.heads * self.head_dim
        self.rotated = self.queries + self.kv_heads * self.head_dim
        self.input_norm = packing.norm_type(layer.input_layernorm, packing.weight_dtype)
        self.post_norm = packing.norm_type(layer.post_attention_layernorm, packing.weight_dtype)

        def joined(kind: str) -> Tensor:
            q, k, v = (getattr(m, kind).detach() for m in (attention.q_proj, attention.k_proj, attention.v_proj))
            q = pair_channels(q, attention.heads).unflatten(0, (self.kv_heads, self.groups, self.head_dim))
            return torch.cat((q.transpose(0, 1).flatten(0, 2), pair_channels(k, self.kv_heads), v))

        bias_O = None if attention.q_proj.bias is None else joined("bias")
        self.qkv = packing.linear(joined("weight"), bias_O, self.input_norm)
        output_DH = attention.o_proj.weight.detach().unflatten(1, (self.kv_heads, self.groups, self.head_dim))
        self.output = packing.linear(output_DH.transpose(1, 2).flatten(1), attention.o_proj.bias)
        gate, up = mlp.gate_proj, mlp.up_proj
        self.gate_up: Linear
        if packing.weight_dtype == "plain" and not (
            packing.in_triton or gate.weight.is_cuda
        ):  # no room for a joined copy
            self.gate_up = PlainPair(packing.linear(gate.weight, gate.bias), packing.linear(up.weight, up.bias))
        else:
            bias_O = None if gate.bias is None else torch.cat((gate.bias.detach(), up.bias.detach()))
            both = joined_halves if packing.weight_dtype == "plain" else concatenated
            self.gate_up = packing.linear(both(gate.weight, up.weight), bias_O, self.post_norm)
        self.down = packing.linear(mlp.down_proj.weight, mlp.down_proj.bias)
        # A module's own call looks for hooks, hundreds of times a step.
        self.matmuls = [linear.forward if isinstance(linear, PackedLinear) else linear for linear in self.linears]

    @property
    def linears(self) -> list[Linear]:
        return [self.qkv, self.output, self.gate_up, self.down]

    def __call__(self, stream: ResidualStream, batch: ForwardBatch, number: int, entries_PJ: Tensor) -> None:
        """Add this layer's output to the residual stream."""
        qkv, output, gate_up, down = self.matmuls
        rows = len(batch.slot_R)
        qkv_RO = qkv(self.input_norm(stream.whole_RE))[:rows]
        apply_rope(qkv_RO[:, : self.rotated].view(rows, -1, self.head_dim // 2, 2), batch.rope_RHC)
        entries_PJ.index_copy_(0, batch.slot_R, qkv_RO[:, self.queries :].to(entries_PJ.dtype))
        q_RGKC = qkv_RO[:, : self.queries].view(stream.attended_RGKC.shape).to(entries_PJ.dtype)
        self.attend(q_RGKC.transpose(1, 2), batch, number, stream.attended_RGKC.transpose(1, 2))
        stream.x_RD.add_(self.summed(output(stream.attended_RQ)))
        stream.x_RD.add_(self.summed(down(swiglu(gate_up(self.post_norm(stream.whole_RE))))))

    def summed(self, x_RD: Tensor) -> Tensor:
        """Of a tensor-parallel shard the sum over all shards, in float32."""
        return x_RD if self.tp is None else self.tp.all_reduce(x_RD.float(), self.ordered)

    def attend(self, q_RKGC: Tensor, batch: ForwardBatch, number: int, out_RKGC: Tensor) -> None:
        """Every position's G queries of a key head against its row's keys."""
        for at, layers, mask in batch.blocks:
            keys, values = layers[number]
            out_RKGC[at] = F.scaled_dot_product_attention(q_RKGC[at], keys, values, attn_mask=mask)


class Norm:
    """RMSNorm of the residual stream. With packed float32 weights its own are folded into the next matmul."""

    def __init__(self, norm: RMSNorm, weight_dtype: str) -> None:
        self.folded_D = norm.weight.detach().float() * norm.weight.shape[0] ** 0.5
        self.scale_D = None if weight_dtype == "float32" else self.folded_D

    def __call__(self, stream_RE: Tensor) -> Tensor:
        normed_RD = stream_RE[:, :-TAIL] / torch.linalg.vector_norm(stream_RE, dim=-1, keepdim=True)
        return normed_RD if self.scale_D is None else normed_RD.mul_(self.scale_D)


class PlainLinear:
    """A weight as it is: for a GPU, and for a CPU without memory for packed copies.

    tile: rows of every matmul, padded with zeros; 0: as many as there are. With it a row's bits do not depend on the
    others', as far as the library chooses its kernel by shape alone.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None, tile: int) -> None:
        self.weight_OD, self.bias_O, self.tile = weight_OD, None if bias_O is None else bias_O.detach(), tile

    def __call__(self, x_RD: Tensor) -> Tensor:
        return self.matmul(x_RD).to(x_RD.dtype)

    def matmul(self, x_RD: Tensor) -> Tensor:
        """In the weight's dtype."""
        x_RD = x_RD.to(self.weight_OD.dtype)
        if not self.tile:
            return F.linear(x_RD, self.weight_OD, self.bias_O)
        padded_RD = F.pad(x_RD, (0, 0, 0, -len(x_RD) % self.tile))
        tiles = [F.linear(tile_RD, self.weight_OD, self.bias_O) for tile_RD in padded_RD.split(self.tile)]
        return torch.cat(tiles)[: len(x_RD)]

    def fitting_rows(self, rows: int) -> int:
        return rows

    @property
    def nbytes(self) -> int:
        return self.weight_OD.nbytes


class PlainPair:
    """Two plain layers over the same input, their results side by side."""

    def __init__(self, first: Linear, second: Linear) -> None:
        self.pair = first, second

    def __call__(self, x_RD: Tensor) -> Tensor:
        return torch.cat([linear(x_RD) for linear in self.pair], dim=1)

    def fitting_rows(self, rows: int) -> int:
        return rows

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self.pair)


Linear = PackedLinear | PlainLinear | PlainPair


def concatenated(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first.detach(), second.detach()))


def joined_halves(first: Tensor, second: Tensor) -> Tensor:
    """One tensor of the rows of both weights, which become views of it: they are not held twice."""
    storages = {weight.data.untyped_storage()._cdata for weight in (first, second)}
    if len(storages) > 1 or second.data.storage_offset() != first.data.storage_offset() + first.numel():
        first.data, second.data = concatenated(first, second).chunk(2)
    return first.detach().as_strided((2 * len(first), first.shape[1]), (first.shape[1], 1))


def swiglu(gate_up_RO: Tensor) -> Tensor:
    """(R, F): silu of the first half of each row times the second, some rows at a time: see ONE_THREAD_ELEMENTS."""
    gate_RF, up_RF = gate_up_RO.chunk(2, dim=1)
    rows = max(1, ONE_THREAD_ELEMENTS // gate_RF.shape[1])
    if len(gate_RF) <= rows or gate_RF.is_cuda:
        return F.silu(gate_RF).mul_(up_RF)
    y_RF = gate_up_RO.new_empty(gate_RF.shape)
    for start in range(0, len(y_RF), rows):
        block = slice(start, start + rows)
        torch.mul(F.silu(gate_RF[block]), up_RF[block], out=y_RF[block])
    return y_RF


def pair_channels(rows_HC: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) with channels c and c + C/2 of each head side by side."""
    return rows_HC.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def apply_rope(pairs_RHC2: Tensor, rope_RHC: Tensor) -> None:
    """Rotate pairs of channels (float32) in place."""
    rows = max(1, ONE_THREAD_ELEMENTS // rope_RHC[0].numel())
    if len(pairs_RHC2) <= rows or pairs_RHC2.is_cuda:
        torch.view_as_complex(pairs_RHC2).mul_(rope_RHC)
        return
    for start in range(0, len(pairs_RHC2), rows):
        apply_rope(pairs_RHC2[start : start + rows], rope_RHC[start : start + rows])
