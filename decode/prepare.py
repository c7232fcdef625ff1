"""A Llama made ready for decoding: the same function as the model's own forward, arranged for the machine it runs on.

Rows of all sentences are one flat list of positions, so linear layers see no padding, and prompts being read share a
pass with rows that decode. Weights are packed once (kernels/packed_linear.py), queries, keys and values are one
product, and the rows of that product are stored in the order in which attention wants them:
- rotary pairs side by side, so that a rotation is one complex multiplication (queries and keys are permuted alike,
  their products stay);
- query heads with the group first (G, K, C), so that the G heads which share a key head are a batch of rows without a
  copy; the output projection's columns are permuted to match.

A position's result has the same bits whatever else is in the pass, by construction: products come from layers that
keep them (`invariant`), attention is always G queries against one row's keys, and those are padded to a multiple of
64, where the library's sums have one order. A position of a prompt costs its own small product for that, which is
little beside the linear layers.

The model given is not changed. On the CPU activations and cache are float32 whatever the weights' storage.
"""

# R positions of all rows  B rows of a span  T positions of each  S cached positions  E key and value  D model width
# H query heads  K key/value heads  G = H/K  C head width  F feed-forward width  V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import PackedLinear
from minillama import KVCache, Llama, LlamaConfig
from minillama.model import Layer, rope_frequencies

KEYS_MULTIPLE = 64
# Complex numbers that are multiplied at once. Up to here PyTorch uses one thread: a part's end is a row's end, and the
# processor's vectors divide a row.
ROTATED_AT_ONCE = 32_768
# A row of zeros stands in for products of one tile on a GPU.
GPU_TILE_ROWS = 64


@dataclass(frozen=True)
class Span:
    """Cache rows `first .. first + rows - 1`, each of which gets `count` new positions in this pass."""

    first: int
    rows: int
    count: int


class Pass:
    """Where the positions of one forward pass lie, for one member: its rows, its rotations, who sees which keys.

    spans: in the order of the flat positions.   starts: for each row of each span the number of positions it has.
    """

    def __init__(
        self, config: LlamaConfig, spans: Sequence[Span], starts: Sequence[int], capacity: int, device: torch.device
    ) -> None:
        self.spans = spans
        rows, positions = [], []
        begin = iter(starts)
        self.keys = []  # of each span: cached positions that its queries look at
        for span in spans:
            last = 0
            for row in range(span.first, span.first + span.rows):
                start = next(begin)
                rows += [row * capacity] * span.count
                positions += range(start, start + span.count)
                last = max(last, start + span.count)
            if last > capacity:
                raise ValueError(f"position {last - 1} runs past the end of a cache of {capacity} positions")
            self.keys.append(min(-(-last // KEYS_MULTIPLE) * KEYS_MULTIPLE, capacity))
        position_R = torch.tensor(positions, device=device)
        self.slot_R = torch.tensor(rows, device=device) + position_R
        angle_RC = position_R[:, None].float() * rope_frequencies(config, device)
        heads = config.num_attention_heads + config.num_key_value_heads
        turn_RC = torch.polar(torch.ones_like(angle_RC), angle_RC)
        self.turn_RHC = turn_RC[:, None].expand(-1, heads, -1).contiguous()
        key_S = torch.arange(max(self.keys), device=device)
        hidden_RS = key_S > position_R[:, None]
        self.mask_RS = torch.zeros(hidden_RS.shape, device=device).masked_fill_(hidden_RS, float("-inf"))


class PreparedLlama:
    """`PreparedLlama(model)` decodes what `model` would.

    storage: how the CPU holds the weights of linear layers, see `PackedLinear`; "plain" leaves them where they are,
    which costs no memory.   invariant: see the head of this file; without it products take the library's fastest way.
    consume: take the model's weights layer by layer, so that both are never held; the model is empty afterwards.
    """

    def __init__(
        self, model: Llama, storage: str = "auto", invariant: bool = True, consume: bool = False
    ) -> None:
        self.config = model.config
        self.device = model.device
        self.stop_tokens = model.stop_tokens
        self.invariant = invariant
        on_cpu = self.device.type == "cpu"
        # Of activations and cache.
        self.dtype = torch.float32 if on_cpu else model.dtype

        def pack(weight_OD: Tensor, bias: Tensor | None) -> "PackedLinear | PlainLinear":
            if on_cpu and storage != "plain":
                return PackedLinear(weight_OD, bias, dtype=storage, invariant=invariant)
            return PlainLinear(weight_OD, bias, GPU_TILE_ROWS if invariant else 0)

        self.embedding_VD = model.model.embed_tokens.weight.detach()
        self.layers = []
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                self.layers.append(PreparedLayer(layer, self.config, pack))
                if consume:
                    model.model.layers[number] = nn.Identity()
            self.head = pack(model.output_weight.detach(), None)
            if consume and model.lm_head is not None:
                model.lm_head = None
        self.norm_D = model.model.norm.weight.detach().to(self.dtype)
        self.storage = self.head.dtype if isinstance(self.head, PackedLinear) else "plain"

    def cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for passes of this model; the capacity is rounded up to what attention reads at once."""
        capacity = -(-capacity // KEYS_MULTIPLE) * KEYS_MULTIPLE
        return KVCache(self.config, batch_size, capacity, self.dtype, self.device)

    def hidden(self, tokens_R: Tensor, positions: Pass, cache: KVCache) -> Tensor:
        """(R, D) after the last norm; keys and values go to the positions' places in the cache.

        The cache's `lengths_B` are neither read nor set: whoever makes the passes knows how long its rows are.
        """
        x_RD = F.embedding(tokens_R, self.embedding_VD).to(self.dtype)
        for number, layer in enumerate(self.layers):
            x_RD = layer(x_RD, positions, cache.entries_LBSEKC[number])
        return F.rms_norm(x_RD, (x_RD.shape[-1],), self.norm_D, self.config.rms_norm_eps)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V)"""
        return self.head(hidden_RD)


class PreparedLayer:
    def __init__(self, layer: Layer, config: LlamaConfig, pack: Callable) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.groups = self.heads // self.kv_heads
        self.eps = config.rms_norm_eps
        self.input_norm_D = layer.input_layernorm.weight.detach()
        self.post_norm_D = layer.post_attention_layernorm.weight.detach()
        if self.input_norm_D.device.type == "cpu":
            self.input_norm_D, self.post_norm_D = self.input_norm_D.float(), self.post_norm_D.float()

        def joined(part: str) -> Tensor | None:
            q, k, v = (getattr(m, part) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
            if q is None:
                return None
            q = pair_channels(q.detach(), self.heads).unflatten(0, (self.kv_heads, self.groups, self.head_dim))
            k = pair_channels(k.detach(), self.kv_heads)
            return torch.cat((q.transpose(0, 1).flatten(0, 2), k, v.detach()))

        weight_OD = joined("weight")
        assert weight_OD is not None
        self.qkv = pack(weight_OD, joined("bias"))
        o_DH = attention.o_proj.weight.detach().unflatten(1, (self.kv_heads, self.groups, self.head_dim))
        self.output = pack(o_DH.transpose(1, 2).flatten(1), attention.o_proj.bias)
        self.gate = pack(mlp.gate_proj.weight.detach(), mlp.gate_proj.bias)
        self.up = pack(mlp.up_proj.weight.detach(), mlp.up_proj.bias)
        self.down = pack(mlp.down_proj.weight.detach(), mlp.down_proj.bias)

    def __call__(self, x_RD: Tensor, positions: Pass, entries_BSEKC: Tensor) -> Tensor:
        width = x_RD.shape[-1:]
        qkv_RO = self.qkv(F.rms_norm(x_RD, width, self.input_norm_D, self.eps))
        queries = self.heads * self.head_dim
        turned = queries + self.kv_heads * self.head_dim
        turn(qkv_RO[:, :turned].unflatten(1, (-1, self.head_dim)), positions.turn_RHC)
        entries_PJ = entries_BSEKC.view(-1, 2 * self.kv_heads * self.head_dim)
        entries_PJ.index_copy_(0, positions.slot_R, qkv_RO[:, queries:].to(entries_PJ.dtype))
        q_RGKC = qkv_RO[:, :queries].unflatten(1, (self.groups, self.kv_heads, self.head_dim))
        x_RD = x_RD + self.output(self.attend(q_RGKC, positions, entries_BSEKC))
        h_RD = F.rms_norm(x_RD, width, self.post_norm_D, self.eps)
        return x_RD + self.down(self.up(h_RD, multiply=self.gate(h_RD, silu=True)))

    def attend(self, q_RGKC: Tensor, positions: Pass, entries_BSEKC: Tensor) -> Tensor:
        """(R, H*C) in the order (G, K, C): every position's G queries of a key head against its row's keys."""
        q_RKGC = q_RGKC.transpose(1, 2)
        mask_R11S = positions.mask_RS[:, None, None]
        parts, start = [], 0
        for span, keys in zip(positions.spans, positions.keys):
            stop = start + span.rows * span.count
            keys_BKSC, values_BKSC = entries_BSEKC[span.first : span.first + span.rows, :keys].permute(2, 0, 3, 1, 4)
            if span.count == 1:
                mask = mask_R11S[start:stop, ..., :keys]
                parts.append(F.scaled_dot_product_attention(q_RKGC[start:stop], keys_BKSC, values_BKSC, attn_mask=mask))
            elif span.rows == 1:
                row = slice(start, stop)
                expanded = (t.expand(span.count, -1, -1, -1) for t in (keys_BKSC, values_BKSC))
                mask = mask_R11S[row, ..., :keys]
                parts.append(F.scaled_dot_product_attention(q_RKGC[row], *expanded, attn_mask=mask))
            else:  # the t-th position of all rows together
                out = torch.empty_like(q_RGKC[start:stop]).transpose(1, 2)
                for first in range(start, start + span.count):
                    row = slice(first, stop, span.count)
                    mask = mask_R11S[row, ..., :keys]
                    out[first - start :: span.count] = F.scaled_dot_product_attention(
                        q_RKGC[row], keys_BKSC, values_BKSC, attn_mask=mask
                    )
                parts.append(out)
            start = stop
        out_RKGC = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out_RKGC.transpose(1, 2).flatten(1)


class PlainLinear:
    """Joined weights as they are: for a GPU, and for a CPU without room for packed copies.

    tile: rows of every product, padded with zeros; 0: as many as there are. With it a row's bits do not depend on the
    others', as far as the library's choice of a kernel depends on the shape alone.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None, tile: int) -> None:
        self.weight_OD, self.bias_O, self.tile = weight_OD, None if bias_O is None else bias_O.detach(), tile

    def __call__(self, x_RD: Tensor, *, silu: bool = False, multiply: Tensor | None = None) -> Tensor:
        if not self.tile:
            y_RO = self._linear(x_RD)
        else:
            rows = x_RD.shape[0]
            x_RD = F.pad(x_RD, (0, 0, 0, -rows % self.tile))
            y_RO = torch.cat([self._linear(part) for part in x_RD.split(self.tile)])[:rows]
        y_RO = F.silu(y_RO) if silu else y_RO
        return y_RO if multiply is None else y_RO * multiply

    def _linear(self, x_RD: Tensor) -> Tensor:
        return F.linear(x_RD.to(self.weight_OD.dtype), self.weight_OD, self.bias_O).to(x_RD.dtype)


def pair_channels(rows_HC: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) with channels c and c + C/2 of each head side by side."""
    return rows_HC.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turn(x_RHC: Tensor, turn_RHC: Tensor) -> None:
    """Rotate pairs of channels in place."""
    pairs = x_RHC.unflatten(-1, (-1, 2))
    if x_RHC.dtype == torch.float32:
        rows = max(1, ROTATED_AT_ONCE // turn_RHC[0].numel())
        for start in range(0, x_RHC.shape[0], rows):
            torch.view_as_complex(pairs[start : start + rows]).mul_(turn_RHC[start : start + rows])
    else:
        x_RHC.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turn_RHC).flatten(-2))
