"""A Llama too large for one device, split over the processes of a group (Megatron-LM, Shoeybi et al. 2019, section 3).

Queries, keys, values, gate and up are split by what they put out (whole heads, ranges of inner channels), the
projections behind them by what they take in: a layer needs two sums over the group and exchanges nothing else. The
embedding and the output layer are split by the vocabulary: looking a token up is one more sum, and every process
gathers all logits. Norms are small and everywhere. A process's part is an ordinary Llama with fewer heads, so whatever
rearranges a model's weights takes a part as it is, and its cache is as much smaller.

torch.distributed.tensor.parallel would make DTensors of the parameters. That fits a model that runs as it is; decoding
joins weights and packs them into forms that are no parameters any more (decode/prepare.py), and would have to take the
DTensors apart first. So weights are sliced here as they are read, and the three exchanges are called by name.

Inference alone: no gradient goes through the exchanges. Nothing here knows how processes are started.
"""

# R positions  D model width  V vocabulary  O outputs of a part

from __future__ import annotations

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
from minillama.model import Embedding, Layer, Linear, Llama
from minillama.weights import check_shapes, fill, open_folder

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")
BY_VOCABULARY = ("embed_tokens", "lm_head")


class PeerLost(RuntimeError):
    """Another process of the group does not answer any more; the text says what that means."""


@dataclass(frozen=True)
class Part:
    """What this process holds of a model: slice `index` of `count`.

    group: the processes that hold the others, this one at place `index`; None: torch.distributed's default group.
    """

    index: int
    count: int
    group: dist.ProcessGroup | None = None

    def config(self, whole: LlamaConfig) -> LlamaConfig:
        """The shape of a part. The vocabulary is the whole one: that is how many logits there are."""
        check_divides(whole, self.count)
        return replace(
            whole,
            num_attention_heads=whole.num_attention_heads // self.count,
            num_key_value_heads=whole.num_key_value_heads // self.count,
            intermediate_size=whole.intermediate_size // self.count,
        )

    def vocabulary_rows(self, vocabulary: int) -> int:
        """Tokens of a part; the last one may be filled up with rows of zeros."""
        return -(-vocabulary // self.count)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, by its Hugging Face name: a view where it is one slice."""
        module, leaf = name.split(".")[-2:]
        if module in BY_VOCABULARY:
            rows = self.vocabulary_rows(len(tensor))
            part = tensor[self.index * rows : (self.index + 1) * rows]
            return part if len(part) == rows else F.pad(part, (0, 0, 0, rows - len(part)))
        if module in BY_OUTPUTS:
            return tensor.chunk(self.count)[self.index]
        if module in BY_INPUTS:
            if leaf == "bias":  # added once
                return tensor if self.index == 0 else torch.zeros_like(tensor)
            return tensor.chunk(self.count, dim=1)[self.index]
        return tensor

    def summed(self, x: Tensor, ordered: bool = False) -> Tensor:
        """The sum of all processes' x, in its place where it is contiguous; the same bits in every process.

        ordered: one number's sum has the same bits wherever in x it stands and however large x is. Two numbers have one
        sum; of more the library's order follows the size, so they are gathered and added here.
        """
        x = x.contiguous()
        if not ordered or self.count == 2:
            self._exchange(lambda: dist.all_reduce(x, group=self.group))
            return x
        first, *others = self._gathered(x)
        for other in others:
            first += other
        return first

    def embedded(self, tokens: Tensor, part_OD: Tensor) -> Tensor:
        """(…, D) of tokens, each from the process whose part of the embedding has its row; float32."""
        own = tokens - self.index * len(part_OD)
        held = (own >= 0) & (own < len(part_OD))
        embedded = F.embedding(own.where(held, 0), part_OD).float()
        return self.summed(embedded * held[..., None])

    def logits(self, part: Tensor, vocabulary: int) -> Tensor:
        """Logits (…, V) from every process's own (…, O)."""
        return torch.cat(self._gathered(part.contiguous()), dim=-1)[..., :vocabulary]

    def agreed(self, values: Tensor) -> Tensor:
        """The first process's values, in all of them, in place: for what must not differ by a bit or a clock."""
        self._exchange(lambda: dist.broadcast(values, group_src=0, group=self.group))
        return values

    def least(self, values: Tensor) -> Tensor:
        """The least of all processes' values, in place."""
        minimum = dist.ReduceOp.MIN
        self._exchange(lambda: dist.all_reduce(values, minimum, group=self.group))
        return values

    def _gathered(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.count)]
        self._exchange(lambda: dist.all_gather(parts, x, group=self.group))
        return parts

    def _exchange(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # the backends' errors; a shape that does not fit cannot come here
            reason = str(error).strip().split("\n")[0]
            raise PeerLost(f"a process that holds a part of a model does not answer ({reason})") from None


class LlamaPart(Llama):
    """A process's part of a Llama; called as the whole one is, by all processes of the group together.

    `config` is the part's, `part` says which. `load_part` fills it.
    """

    def __init__(self, whole: LlamaConfig, part: Part) -> None:
        super().__init__(part.config(whole))
        self.part = part
        rows, width = part.vocabulary_rows(whole.vocab_size), whole.hidden_size
        self.model.embed_tokens = _EmbeddingPart(rows, width, part)
        if self.lm_head is not None:
            self.lm_head = Linear(width, rows, bias=False)
        inner = self.config.num_attention_heads * self.config.head_dim
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.self_attn.o_proj = _SummedLinear(inner, width, whole.attention_bias, part)
            layer.mlp.down_proj = _SummedLinear(self.config.intermediate_size, width, whole.mlp_bias, part)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        return self.part.logits(super().forward(tokens, cache, positions), self.config.vocab_size)

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError("a part is no model that could be loaded; save the whole one")


class _SummedLinear(Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool, part: Part) -> None:
        super().__init__(inputs, outputs, bias)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part.summed(super().forward(x))


class _EmbeddingPart(Embedding):
    def __init__(self, rows: int, width: int, part: Part) -> None:
        super().__init__(rows, width)
        self.part = part

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part.embedded(tokens, self.weight).to(self.weight.dtype)


def check_divides(config: LlamaConfig, count: int, name: str = "the model") -> None:
    """Raises InputError where heads or inner channels cannot be shared out evenly; `name` is for its text."""
    for field, what in (
        ("num_attention_heads", "attention heads"),
        ("num_key_value_heads", "key and value heads"),
        ("intermediate_size", "inner channels"),
    ):
        found = getattr(config, field)
        if found % count:
            possible = [n for n in range(2, config.num_key_value_heads + 1) if _divides(config, n)]
            hint = f"it can be split in {', '.join(map(str, possible))}" if possible else "it cannot be split"
            raise InputError(f"{name} has {found:,} {what}, which {count} processes cannot share evenly; {hint}")


def _divides(config: LlamaConfig, count: int) -> bool:
    numbers = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    return all(number % count == 0 for number in numbers)


def load_part(
    folder: str | Path, part: Part, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LlamaPart:
    """This process's part of a folder's model, in Hugging Face's or Meta's layout; see `Llama.from_pretrained`.

    Of each tensor the slice alone is copied from the memory map. Processes need not wait for each other here. Raises
    InputError for what cannot be run or cannot be split, before a weight is read.
    """
    checkpoint = open_folder(resolve_folder(folder))
    check_divides(checkpoint.config, part.count, str(folder))
    with torch.device("meta"):
        whole = Llama(checkpoint.config)
        model = LlamaPart(checkpoint.config, part)
    check_shapes(whole, checkpoint)
    fill(model, checkpoint, dtype, torch.device(device), part.of)
    model.stop_tokens = checkpoint.stop_tokens
    return model.eval()
