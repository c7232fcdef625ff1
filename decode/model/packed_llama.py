"""A Llama packed for inference: the same function as the model's own forward, arranged for the machine that runs it.

The positions of all sequences are one flat list, so linear layers see no padding, and prompts that are being read share
a forward pass with sequences that decode. Weights are packed once (kernels/cpu/packed_linear.py); a layer is described
in layer.py, the same layer in Triton kernels in cuda_layer.py. Activations are float32 whatever the weight dtype; the
cache is float32 on a CPU and has the model's dtype on a GPU. The model given is not changed.
"""

# R positions of all sequences  E width of the residual stream with its tail  D model width  V vocabulary  L layers
# P positions of a KV cache  J keys and values of a position

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decode.model.batch import ForwardBatch, cache_positions
from decode.model.layer import TAIL, Linear, Norm, PackedLayer, Packing, PlainLinear, PlainPair, ResidualStream
from kernels import backend
from kernels.cpu.packed_linear import lossless_dtype
from minillama import KVCache, Llama
from minillama.model import Layer
from minillama.tensor_parallel import LlamaShard

# Layers that are packed at once where packing is slow: so many are held in both forms.
PACKERS = 4


class PackedLlama:
    """`PackedLlama(model)` decodes as `model` would. All processes of a tensor-parallel group run every pass together.

    weight_dtype: how a CPU holds the weights of linear layers, see `PackedLinear`; "plain" leaves them as they are,
    which costs no memory but for queries, keys and values.   invariant: a position's result has the same bits whatever
    else is in the batch (layer.py); without it matmuls take the library's fastest way.
    consume: take the model's weights layer by layer, so that no more than PACKERS are held twice; the model is empty
    afterwards.
    """

    def __init__(self, model: Llama, weight_dtype: str = "auto", invariant: bool = True, consume: bool = False) -> None:
        self.config = model.config
        self.device = model.device
        self.stop_tokens = model.stop_tokens
        self.tp = model.tp if isinstance(model, LlamaShard) else None
        on_cpu = self.device.type == "cpu"
        if weight_dtype == "auto":
            weight_dtype = lossless_dtype(model.dtype)
        self.weight_dtype = weight_dtype if on_cpu else "plain"
        self.cache_dtype = torch.float32 if on_cpu else model.dtype
        self.embedding_VD = model.model.embed_tokens.weight.detach()
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        tail = [(width * eps) ** 0.5, *[0.0] * (TAIL - 1)]
        self.tail_E = torch.tensor(tail, dtype=torch.float32, device=self.device)
        layer_type: type[PackedLayer] = PackedLayer
        norm_type: type[Norm] = Norm
        linear_type: type[PlainLinear] = PlainLinear
        self.in_triton = self.weight_dtype == "plain" and backend(self.device) == "triton"
        if self.in_triton:  # a machine without Triton can use the rest
            from decode.model.cuda_layer import CudaLayer, CudaLinear, CudaNorm

            layer_type, norm_type, linear_type = CudaLayer, CudaNorm, CudaLinear
        packing = Packing(self.weight_dtype, invariant, self.in_triton, self.tp, norm_type, linear_type)

        def pack_layer(number: int) -> PackedLayer:
            layer = model.model.layers[number]
            assert isinstance(layer, Layer)
            with torch.no_grad():
                packed = layer_type(layer, packing)
            if consume:
                model.model.layers[number] = nn.Identity()
            return packed

        def pack_head() -> Linear:
            with torch.no_grad():
                return packing.linear(model.output_weight, None, self.norm)

        self.norm = norm_type(model.model.norm, self.weight_dtype)
        numbers = range(len(model.model.layers))
        if self.weight_dtype == "float16":  # packed number by number on one core: more than a minute for 10^9 of them
            with ThreadPoolExecutor(min(torch.get_num_threads(), PACKERS)) as pool:
                layers = pool.map(pack_layer, numbers)
                head = pool.submit(pack_head)
                self.layers, self.head = list(layers), head.result()
        else:
            self.layers = [pack_layer(number) for number in numbers]
            self.head = pack_head()
        if consume and model.lm_head is not None:
            model.lm_head = None

    def cache(self, slots: int, capacity: int) -> KVCache:
        """A KV cache for this model with `cache_positions(capacity)` positions in each slot."""
        return KVCache(self.config, slots, cache_positions(capacity), self.cache_dtype, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held: linear layers in their weight dtype, and the embedding."""
        linears = [linear for layer in self.layers for linear in layer.linears] + [self.head]
        return sum(linear.nbytes for linear in linears) + self.embedding_VD.nbytes

    def hidden(self, tokens_R: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """(R, D) after the last norm (without its weights where the head holds them), in the dtype that the head reads.

        Keys and values are written to the batch's positions of the cache. The cache's own `lengths_B` are not used: KV
        slots (decode/engine/kv_slots.py) own the lengths.
        """
        if self.tp is None:
            embedded_RD = F.embedding(tokens_R, self.embedding_VD)
        else:
            embedded_RD = self.tp.embedding(tokens_R, self.embedding_VD)
        stream = ResidualStream(self.layers[0], embedded_RD, self.tail_E, cache.entries_LBSEKC.dtype)
        entries_LPJ = cache.entries_LBSEKC.flatten(3).flatten(1, 2)
        for number, (layer, entries_PJ) in enumerate(zip(self.layers, entries_LPJ.unbind())):
            layer(stream, batch, number, entries_PJ)
        return self.norm(stream.whole_RE[: len(tokens_R)])

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) for what `hidden` returned: float32 from packed weights, else in the weights' own dtype.

        The weighted sum is formed in float32 from any dtype, so narrow logits are not widened here.
        """
        logits_RV = self.head.matmul(hidden_RD) if isinstance(self.head, PlainLinear) else self.head(hidden_RD)
        return logits_RV if self.tp is None else self.tp.gather_logits(logits_RV, self.config.vocab_size)

    def output_matrix(self) -> Tensor:
        """(V, D) by which `logits` multiplies what `hidden` returns, in the same dtype. A new tensor where a packed
        layer holds it.
        """
        assert not isinstance(self.head, PlainPair)
        return self.head.weight_OD if isinstance(self.head, PlainLinear) else self.head.unpacked()
