"""A Llama made ready for decoding: the same function as the model's own forward, arranged for the machine it runs on.

Rows of all sentences are one flat list of positions, so linear layers see no padding, and prompts being read share a
pass with rows that decode. Weights are packed once (kernels/packed_linear.py), queries, keys and values are one
product, gate and up another, and everything is stored in the order in which the next operation wants it:
- rotary pairs side by side, so that a rotation is one complex multiplication (queries and keys are permuted alike,
  their products stay);
- query heads with the group first (G, K, C), so that the G heads which share a key head are rows of one product without
  a copy; the output projection's columns are permuted to match;
- behind every row of the residual stream the square root of D * epsilon: the length of that longer vector is what
  RMSNorm divides by, up to a factor that goes into the norm's weights, and those go into the product behind where that
  costs no digit (float32). A norm is two operations.

A position's result has the same bits whatever else is in the pass, by construction: products come from layers that
keep them (`invariant`), attention is always G queries against one row's keys, and those are padded to a multiple of
64, where the library's sums have one order (on a GPU it is a kernel of ours, decode/gpu_layer.py). A position of a
prompt costs its own small product for that, which is little beside the linear layers.

Activations are float32 whatever the storage of the weights; the cache is float32 on a CPU and the model's dtype on a
GPU. The function of the model given is not changed.
"""

# R positions of all rows  B rows of a span  T positions of each  S cached positions  E key and value  D model width
# H query heads  K key/value heads  G = H/K  C head width  F feed-forward width  V vocabulary

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decode.model.batch import Pass, cache_positions
from kernels import PackedLinear, backend
from kernels.cpu.packed_linear import lossless_storage
from minillama import KVCache, Llama
from minillama.model import Layer, RMSNorm
from minillama.tensor_parallel import LlamaShard

# Floats behind each row of the residual stream: the first makes its length that of RMSNorm, the others align the rows.
TAIL = 16
# More elements than these PyTorch divides among threads, at places that no row's end need be at: more rows are taken in
# parts.
ONE_THREAD_ELEMENTS = 32_768
# Layers that are packed at once, where packing takes long: so many are held in both forms.
PACKERS = 4
# Rows of every product on a GPU under `invariant`.
GPU_TILE_ROWS = 64


class PreparedLlama:
    """`PreparedLlama(model)` decodes what `model` would. Of a LlamaShard all processes make every pass together.

    storage: how the CPU holds the weights of linear layers, see `PackedLinear`; "plain" leaves them where they are,
    which costs no memory but for queries, keys and values.   invariant: see the head of this file; without it products
    take the library's fastest way.
    consume: take the model's weights layer by layer, so that no more than PACKERS are held twice; the model is empty
    afterwards.
    """

    def __init__(self, model: Llama, storage: str = "auto", invariant: bool = True, consume: bool = False) -> None:
        self.config = model.config
        self.device = model.device
        self.stop_tokens = model.stop_tokens
        self.invariant = invariant
        self.part = model.tp if isinstance(model, LlamaShard) else None
        on_cpu = self.device.type == "cpu"
        if storage == "auto":
            storage = lossless_storage(model.dtype)
        self.storage = storage if on_cpu else "plain"
        self.cache_dtype = torch.float32 if on_cpu else model.dtype
        self.embedding_VD = model.model.embed_tokens.weight.detach()
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        tail = [(width * eps) ** 0.5, *[0.0] * (TAIL - 1)]
        self.tail_E = torch.tensor(tail, dtype=torch.float32, device=self.device)
        layer_kind: type[PreparedLayer] = PreparedLayer
        self.norm_kind: type[Norm] = Norm
        self.plain_kind: type[PlainLinear] = PlainLinear
        # Whether kernels of ours stand between the products; their attention reads of a row what is filled.
        self.in_triton = self.storage == "plain" and backend(self.device) == "triton"
        if self.in_triton:
            from decode.model.cuda_layer import GpuLayer, GpuLinear, GpuNorm

            layer_kind, self.norm_kind, self.plain_kind = GpuLayer, GpuNorm, GpuLinear

        def prepared(number: int) -> PreparedLayer:
            layer = model.model.layers[number]
            assert isinstance(layer, Layer)
            with torch.no_grad():
                made = layer_kind(layer, self)
            if consume:
                model.model.layers[number] = nn.Identity()
            return made

        def prepared_head() -> Linear:
            with torch.no_grad():
                return self.linear(model.output_weight, None, self.norm)

        self.norm = self.norm_kind(model.model.norm, self.storage)
        numbers = range(len(model.model.layers))
        if self.storage == "float16":  # packed number by number, on one core: a minute and more for 10^9 of them
            with ThreadPoolExecutor(min(torch.get_num_threads(), PACKERS)) as pool:
                layers = pool.map(prepared, numbers)
                head = pool.submit(prepared_head)
                self.layers, self.head = list(layers), head.result()
        else:
            self.layers = [prepared(number) for number in numbers]
            self.head = prepared_head()
        if consume and model.lm_head is not None:
            model.lm_head = None

    def linear(self, weight_OD: Tensor, bias_O: Tensor | None, norm: "Norm | None" = None) -> "Linear":
        """A linear layer in this model's storage, with the weights of the norm before it where it takes them."""
        weight_OD = weight_OD.detach()
        if self.storage == "plain":
            return self.plain_kind(weight_OD, bias_O, GPU_TILE_ROWS if self.invariant else 0)
        if norm is not None and norm.scale_D is None:
            weight_OD = weight_OD.float() * norm.folded_D
        return PackedLinear(weight_OD, bias_O, dtype=self.storage, invariant=self.invariant)

    def cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for passes of this model, of `cache_positions(capacity)` positions a row."""
        return KVCache(self.config, batch_size, cache_positions(capacity), self.cache_dtype, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held: linear layers in their storage, and the embedding."""
        linears = [linear for layer in self.layers for linear in layer.linears] + [self.head]
        return sum(linear.nbytes for linear in linears) + self.embedding_VD.nbytes

    @property
    def average_weight(self) -> tuple[float, float]:
        """(bytes, numbers) of a layer's linears."""
        linears = self.layers[0].linears
        return tuple(
            sum(sizes) / len(linears) for sizes in zip(*((linear.nbytes, linear.numbers) for linear in linears))
        )

    def hidden(self, tokens_R: Tensor, positions: Pass, cache: KVCache) -> Tensor:
        """(R, D) after the last norm (but for its weights, where the head holds them): float32, or what the head reads.

        Keys and values go to the positions' places in the cache, whose `lengths_B` are neither read nor set: whoever
        makes the passes knows how long its rows are.
        """
        if self.part is None:
            embedded_RD = F.embedding(tokens_R, self.embedding_VD)
        else:
            embedded_RD = self.part.embedding(tokens_R, self.embedding_VD)
        stream = Stream(self, embedded_RD, cache.entries_LBSEKC.dtype)
        entries_LPJ = cache.entries_LBSEKC.flatten(3).flatten(1, 2)
        for number, (layer, entries_PJ) in enumerate(zip(self.layers, entries_LPJ.unbind())):
            layer(stream, positions, number, entries_PJ)
        return self.norm(stream.whole_RE[: len(tokens_R)])

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) for what `hidden` returned: float32, where weights stay as they are in their dtype.

        The combined choice adds in float32 whatever it is given, so what is written and read again is not made wider.
        """
        logits_RV = self.head.product(hidden_RD) if isinstance(self.head, PlainLinear) else self.head(hidden_RD)
        return logits_RV if self.part is None else self.part.gather_logits(logits_RV, self.config.vocab_size)

    def output_matrix(self) -> Tensor:
        """(V, D) by which `logits` multiplies what `hidden` returns, in the dtype that it brings that to. A new tensor
        where a packed layer holds it.
        """
        assert not isinstance(self.head, PlainPair)
        return self.head.weight_OD if isinstance(self.head, PlainLinear) else self.head.unpacked()


class Stream:
    """The residual stream of a pass, (R, D) float32 with TAIL floats behind each row, and views of it.

    Rows that every product would be padded with stand behind the others from the beginning.
    """

    def __init__(self, model: PreparedLlama, embedded_RD: Tensor, dtype: torch.dtype) -> None:
        rows, width = embedded_RD.shape
        first = model.layers[0]
        padded = max(linear.fitting_rows(rows) for linear in first.linears)
        self.whole_RE = torch.empty(padded, width + TAIL, dtype=torch.float32, device=embedded_RD.device)
        self.x_RD = self.whole_RE[:, :-TAIL]
        self.own_RD = self.x_RD[:rows]  # of the positions
        self.own_RD.copy_(embedded_RD)
        if model.in_triton:  # its norms need nothing behind a row
            return
        self.whole_RE[:, -TAIL:].copy_(model.tail_E.expand(padded, -1))
        self.x_RD[rows:].zero_()
        # What attention writes, with the rows of padding that the product behind it wants.
        self.attended_RQ = torch.zeros(padded, first.queries, dtype=dtype, device=embedded_RD.device)
        self.attended_RGKC = self.attended_RQ[:rows].view(rows, first.groups, first.kv_heads, first.head_dim)


class PreparedLayer:
    def __init__(self, layer: Layer, model: PreparedLlama) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.part, self.ordered = model.part, model.invariant
        self.kv_heads, self.head_dim = attention.kv_heads, attention.head_dim
        self.groups = attention.heads // attention.kv_heads
        self.queries = attention.heads * self.head_dim
        self.turned = self.queries + self.kv_heads * self.head_dim
        self.input_norm = model.norm_kind(layer.input_layernorm, model.storage)
        self.post_norm = model.norm_kind(layer.post_attention_layernorm, model.storage)

        def joined(part: str) -> Tensor:
            q, k, v = (getattr(m, part).detach() for m in (attention.q_proj, attention.k_proj, attention.v_proj))
            q = pair_channels(q, attention.heads).unflatten(0, (self.kv_heads, self.groups, self.head_dim))
            return torch.cat((q.transpose(0, 1).flatten(0, 2), pair_channels(k, self.kv_heads), v))

        bias_O = None if attention.q_proj.bias is None else joined("bias")
        self.qkv = model.linear(joined("weight"), bias_O, self.input_norm)
        output_DH = attention.o_proj.weight.detach().unflatten(1, (self.kv_heads, self.groups, self.head_dim))
        self.output = model.linear(output_DH.transpose(1, 2).flatten(1), attention.o_proj.bias)
        gate, up = mlp.gate_proj, mlp.up_proj
        self.gate_up: Linear
        if model.storage == "plain" and not (model.in_triton or gate.weight.is_cuda):  # no room for a joined copy
            self.gate_up = PlainPair(model.linear(gate.weight, gate.bias), model.linear(up.weight, up.bias))
        else:
            bias_O = None if gate.bias is None else torch.cat((gate.bias.detach(), up.bias.detach()))
            both = joined_halves if model.storage == "plain" else concatenated
            self.gate_up = model.linear(both(gate.weight, up.weight), bias_O, self.post_norm)
        self.down = model.linear(mlp.down_proj.weight, mlp.down_proj.bias)
        # A module's own call looks for hooks, hundreds of times a step.
        self.products = [linear.forward if isinstance(linear, PackedLinear) else linear for linear in self.linears]

    @property
    def linears(self) -> list["Linear"]:
        return [self.qkv, self.output, self.gate_up, self.down]

    def __call__(self, stream: Stream, positions: Pass, number: int, entries_PJ: Tensor) -> None:
        """Add this layer's part to the residual stream."""
        qkv, output, gate_up, down = self.products
        rows = len(positions.slot_R)
        qkv_RO = qkv(self.input_norm(stream.whole_RE))[:rows]
        turn(qkv_RO[:, : self.turned].view(rows, -1, self.head_dim // 2, 2), positions.turn_RHC)
        entries_PJ.index_copy_(0, positions.slot_R, qkv_RO[:, self.queries :].to(entries_PJ.dtype))
        q_RGKC = qkv_RO[:, : self.queries].view(stream.attended_RGKC.shape).to(entries_PJ.dtype)
        self.attend(q_RGKC.transpose(1, 2), positions, number, stream.attended_RGKC.transpose(1, 2))
        stream.x_RD.add_(self.summed(output(stream.attended_RQ)))
        stream.x_RD.add_(self.summed(down(swiglu(gate_up(self.post_norm(stream.whole_RE))))))

    def summed(self, part_RD: Tensor) -> Tensor:
        """What is added to the residual stream: of a part of a model the sum of all parts', in float32."""
        return part_RD if self.part is None else self.part.all_reduce(part_RD.float(), self.ordered)

    def attend(self, q_RKGC: Tensor, positions: Pass, number: int, out_RKGC: Tensor) -> None:
        """Every position's G queries of a key head against its row's keys."""
        for at, layers, mask in positions.blocks:
            keys, values = layers[number]
            out_RKGC[at] = F.scaled_dot_product_attention(q_RKGC[at], keys, values, attn_mask=mask)


class Norm:
    """RMSNorm of the residual stream. With packed float32 its weights are left to the products behind it."""

    def __init__(self, norm: RMSNorm, storage: str) -> None:
        self.folded_D = norm.weight.detach().float() * norm.weight.shape[0] ** 0.5
        self.scale_D = None if storage == "float32" else self.folded_D

    def __call__(self, stream_RE: Tensor) -> Tensor:
        normed_RD = stream_RE[:, :-TAIL] / torch.linalg.vector_norm(stream_RE, dim=-1, keepdim=True)
        return normed_RD if self.scale_D is None else normed_RD.mul_(self.scale_D)


class PlainLinear:
    """A weight as it is: for a GPU, and for a CPU without room for packed copies.

    tile: rows of every product, padded with zeros; 0: as many as there are. With it a row's bits do not depend on the
    others', as far as the library's choice of a kernel depends on the shape alone.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None, tile: int) -> None:
        self.weight_OD, self.bias_O, self.tile = weight_OD, None if bias_O is None else bias_O.detach(), tile

    def __call__(self, x_RD: Tensor) -> Tensor:
        return self.product(x_RD).to(x_RD.dtype)

    def product(self, x_RD: Tensor) -> Tensor:
        """In the weight's dtype."""
        x_RD = x_RD.to(self.weight_OD.dtype)
        if not self.tile:
            return F.linear(x_RD, self.weight_OD, self.bias_O)
        padded_RD = F.pad(x_RD, (0, 0, 0, -len(x_RD) % self.tile))
        parts = [F.linear(part_RD, self.weight_OD, self.bias_O) for part_RD in padded_RD.split(self.tile)]
        return torch.cat(parts)[: len(x_RD)]

    def fitting_rows(self, rows: int) -> int:
        return rows

    @property
    def nbytes(self) -> int:
        return self.weight_OD.nbytes

    @property
    def numbers(self) -> int:
        return self.weight_OD.numel()


class PlainPair:
    """Two plain layers over the same input, their results side by side."""

    def __init__(self, first: "Linear", second: "Linear") -> None:
        self.pair = first, second

    def __call__(self, x_RD: Tensor) -> Tensor:
        return torch.cat([linear(x_RD) for linear in self.pair], dim=1)

    def fitting_rows(self, rows: int) -> int:
        return rows

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self.pair)

    @property
    def numbers(self) -> int:
        return sum(linear.numbers for linear in self.pair)


Linear = PackedLinear | PlainLinear | PlainPair


def concatenated(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first.detach(), second.detach()))


def joined_halves(first: Tensor, second: Tensor) -> Tensor:
    """One tensor of both weights' rows, of which they are views from then on: they are not held twice."""
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
        part = slice(start, start + rows)
        torch.mul(F.silu(gate_RF[part]), up_RF[part], out=y_RF[part])
    return y_RF


def pair_channels(rows_HC: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) with channels c and c + C/2 of each head side by side."""
    return rows_HC.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turn(pairs_RHC2: Tensor, turn_RHC: Tensor) -> None:
    """Rotate pairs of channels (float32) in place."""
    rows = max(1, ONE_THREAD_ELEMENTS // turn_RHC[0].numel())
    if len(pairs_RHC2) <= rows or pairs_RHC2.is_cuda:
        torch.view_as_complex(pairs_RHC2).mul_(turn_RHC)
        return
    for start in range(0, len(pairs_RHC2), rows):
        turn(pairs_RHC2[start : start + rows], turn_RHC[start : start + rows])
