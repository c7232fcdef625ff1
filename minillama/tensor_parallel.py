"""Tensor parallelism: a Llama that is too large for one device (Megatron-LM, Shoeybi et al. 2019, section 3).

Query, key, value, gate and up projections are split by their outputs (whole heads, ranges of inner channels), the
projections after them by their inputs: a layer needs two all-reduces. Embedding and output layer are split by the
vocabulary: an embedding lookup is one more all-reduce, and every rank gathers all logits. Norms are replicated. A
rank's shard is an ordinary Llama with fewer heads, so it can be packed like a whole model.

The DTensors of torch.distributed.tensor.parallel cannot be packed, so weights are sliced while they are read and
collectives are called here. No gradient passes through the collectives.
"""

# D model width  V vocabulary  O outputs of a shard

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minillama.cache import KVCache
from minillama.config import LlamaConfig
from minillama.errors import InputError
from minillama.files import resolve_folder
from minillama.model import Embedding, Linear, Llama
from minillama.weights import check_shapes, load_weights, open_folder

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
VOCAB_PARALLEL = ("embed_tokens", "lm_head")
SPLIT_FIELDS = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "intermediate_size": "inner channels",
}


class PeerLost(RuntimeError):
    """Another rank of the group does not answer any more; the text says what follows from it."""


@dataclass(frozen=True)
class TPGroup:
    """The ranks that hold a model together, and this process's rank among them.

    group: their process group, in which this process has the same rank; None: torch.distributed's default group.
    """

    rank: int
    size: int
    group: "dist.ProcessGroup | None" = None

    def shard_config(self, config: LlamaConfig) -> LlamaConfig:
        """The configuration of one rank's shard. `vocab_size` stays, because every rank gathers all logits."""
        check_divides(config, self.size)
        return replace(config, **{field: getattr(config, field) // self.size for field in SPLIT_FIELDS})

    def shard_vocab_size(self, vocab_size: int) -> int:
        """Tokens of one rank's shard; the last shard is padded with rows of zeros."""
        return -(-vocab_size // self.size)

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, by its Hugging Face name: a view where it needs no padding."""
        module, leaf = name.split(".")[-2:]
        if module in VOCAB_PARALLEL:
            rows = self.shard_vocab_size(len(tensor))
            shard = tensor[self.rank * rows : (self.rank + 1) * rows]
            return shard if len(shard) == rows else F.pad(shard, (0, 0, 0, rows - len(shard)))
        if module in COLUMN_PARALLEL:
            return tensor.chunk(self.size)[self.rank]
        if module in ROW_PARALLEL:
            if leaf == "bias":  # must be added once
                return tensor if self.rank == 0 else torch.zeros_like(tensor)
            return tensor.chunk(self.size, dim=1)[self.rank]
        return tensor

    def all_reduce(self, x: Tensor, ordered: bool = False) -> Tensor:
        """The sum of all ranks' x, bit-identical on all of them; in place where x is contiguous.

        ordered: add in one order for any size of x, as the library does for two ranks only.
        """
        x = x.contiguous()
        if not ordered or self.size == 2:
            self._call(dist.all_reduce, x)
            return x
        first, *others = self._all_gather(x)
        for other in others:
            first += other
        return first

    def embedding(self, tokens: Tensor, shard_OD: Tensor) -> Tensor:
        """Embeddings (…, D) float32 of tokens, each from the rank whose shard has its row."""
        index = tokens - self.rank * len(shard_OD)
        is_here = (index >= 0) & (index < len(shard_OD))
        embedded = F.embedding(index.where(is_here, 0), shard_OD).float()
        return self.all_reduce(embedded * is_here[..., None])

    def gather_logits(self, shard: Tensor, vocab_size: int) -> Tensor:
        """Logits (…, V) from every rank's shard (…, O)."""
        return torch.cat(self._all_gather(shard.contiguous()), dim=-1)[..., :vocab_size]

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values on all ranks, in place: for what must not differ by a rounding or a clock."""
        self._call(dist.broadcast, values, group_src=0)
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """The minimum of all ranks' values, in place."""
        self._call(dist.all_reduce, values, dist.ReduceOp.MIN)
        return values

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        shards = [torch.empty_like(x) for _ in range(self.size)]
        self._call(dist.all_gather, shards, x)
        return shards

    def _call(self, collective: Callable[..., object], *arguments: object, **options: object) -> None:
        try:
            collective(*arguments, group=self.group, **options)
        except RuntimeError as error:  # the backend's; shapes are equal on all ranks
            reason = str(error).strip().split("\n")[0]
            raise PeerLost(f"a process that holds a shard of a model does not answer ({reason})") from None


class LlamaShard(Llama):
    """A rank's shard of a Llama, with the shard's `config`; all ranks of the group `tp` call it together."""

    def __init__(self, config: LlamaConfig, tp: TPGroup) -> None:
        super().__init__(tp.shard_config(config))
        self.tp = tp
        rows, width = tp.shard_vocab_size(config.vocab_size), config.hidden_size
        self.model.embed_tokens = _VocabParallelEmbedding(rows, width, tp)
        if self.lm_head is not None:
            self.lm_head = Linear(width, rows, bias=False)
        for name, module in self.named_modules():
            if name.endswith(ROW_PARALLEL):
                module.register_forward_hook(lambda _module, _inputs, output: tp.all_reduce(output))

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        return self.tp.gather_logits(super().forward(tokens, cache, positions), self.config.vocab_size)

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError("a shard cannot be loaded as a model; save the whole model")


class _VocabParallelEmbedding(Embedding):
    def __init__(self, rows: int, width: int, tp: TPGroup) -> None:
        super().__init__(rows, width)
        self.tp = tp

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tp.embedding(tokens, self.weight).to(self.weight.dtype)


def check_divides(config: LlamaConfig, size: int, name: str = "the model") -> None:
    """Raise InputError where heads or inner channels are not divisible by `size`; `name` is the model's in the text."""
    counts = {what: getattr(config, field) for field, what in SPLIT_FIELDS.items()}
    for what, count in counts.items():
        if count % size:
            sizes = range(2, config.num_key_value_heads + 1)
            possible = [str(n) for n in sizes if not any(count % n for count in counts.values())]
            hint = f"it can be split in {', '.join(possible)}" if possible else "it cannot be split"
            raise InputError(f"{name} has {count:,} {what}, which {size} processes cannot share evenly; {hint}")


def load_shard(
    folder: str | Path, tp: TPGroup, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LlamaShard:
    """Load this rank's shard of a folder's model, without waiting for other ranks; see `Llama.from_pretrained`.

    Raises InputError, before a weight is read, for a model that cannot be run or split.
    """
    checkpoint = open_folder(resolve_folder(folder))
    with torch.device("meta"):
        whole, model = Llama(checkpoint.config), LlamaShard(checkpoint.config, tp)
    check_shapes(whole, checkpoint)
    load_weights(model, checkpoint, dtype, device, tp.shard)
    model.stop_tokens = checkpoint.stop_tokens
    return model.eval()
