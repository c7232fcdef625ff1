"""Members of an ensemble: models, the weights of their logits, and what follows from these for all of them.

Models are packed for inference here (decode/model/packed_llama.py), each once, however many members it is. Nothing here
knows texts, where prompts come from, or how a step is made.
"""

# N members

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from decode.engine.expression import format_weights, parse
from decode.model.packed_llama import PackedLlama
from kernels.cpu.packed_linear import lossless_dtype
from kernels.types import MAX_MEMBERS
from minillama import InputError, Llama
from minillama.machine import free_memory


@dataclass(frozen=True)
class Member:
    """One model and its weight in the sum. Prompts and positions are its own, generated tokens are shared."""

    name: str
    model: PackedLlama
    weight: float


class Ensemble:
    """`Ensemble({"L": model_l, "S": model_s}, combine="L + S")`: members whose weighted sum of logits gives each token.

    Models that the expression gives weight zero are dropped. A `Llama` is packed for inference: it stays as it is, and
    on a CPU with enough memory packed copies of its weights are made (weight_dtype: see `PackedLlama`).
    invariant: a sequence's result has the same bits whatever is decoded beside it; None: where that costs nothing, on
    a CPU.   graphs: whether plain steps are CUDA graphs (cuda_graph.py); None: where all members are on one GPU, unless
    COLLAB_GRAPHS=off; True elsewhere: run the function that a graph would replay.   member_threads: whether members on
    a CPU with several threads may run side by side.
    Raises InputError for an expression that does not parse and for vocabularies of different sizes (equal tables are
    the caller's to check: decode/pipeline/members.py).
    """

    def __init__(
        self,
        models: Mapping[str, Llama | PackedLlama],
        combine: str | Mapping[str, float] | None = None,
        weight_dtype: str = "auto",
        invariant: bool | None = None,
        graphs: bool | None = None,
        member_threads: bool = True,
    ) -> None:
        if combine is None:
            combine = " + ".join(models)
        weights = parse(combine, models) if isinstance(combine, str) else {n: w for n, w in combine.items() if w}
        if len(weights) > MAX_MEMBERS:
            raise InputError(f"{len(weights)} models in one ensemble; at most {MAX_MEMBERS} can be summed")
        sizes = {name: models[name].config.vocab_size for name in weights}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise InputError(f"the models' vocabularies differ in size ({listed}); members must share one vocabulary")
        packed: dict[int, PackedLlama] = {}
        for name in weights:
            if id(models[name]) not in packed:
                packed[id(models[name])] = _packed(models[name], weight_dtype, invariant)
        self.members = tuple(Member(name, packed[id(models[name])], weight) for name, weight in weights.items())
        self.weights_N = torch.tensor([m.weight for m in self.members], dtype=torch.float32, device=self.device)
        # The processes of members that are split by tensor parallelism; all take the tokens that the first one chose.
        self.tp = next((member.model.tp for member in self.members if member.model.tp is not None), None)
        devices = {member.model.device for member in self.members}
        if graphs is None:
            graphs = self.device.type == "cuda" and _graphs_enabled()
        self.graphs = graphs and len(devices) == 1 and self.tp is None
        on_cpu = {device.type for device in devices} == {"cpu"}
        self.member_threads = member_threads and on_cpu and self.tp is None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def models(self) -> list[PackedLlama]:
        return [member.model for member in self.members]

    @property
    def weights(self) -> dict[str, float]:
        return {member.name: member.weight for member in self.members}

    @property
    def combine(self) -> str:
        return format_weights(self.weights)

    @property
    def device(self) -> torch.device:
        """Where logits are summed: the first member's device."""
        return self.members[0].model.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        """What ends a text for any member: to a model that reads a token as the end, nothing after it makes sense."""
        return frozenset(token for member in self.members for token in member.model.stop_tokens)

    @property
    def context(self) -> dict[str, int]:
        """Positions that each member was made for."""
        return {member.name: member.model.config.max_position_embeddings for member in self.members}


def _graphs_enabled() -> bool:
    """Whether COLLAB_GRAPHS leaves CUDA graphs on; raises InputError for an unknown value."""
    value = os.environ.get("COLLAB_GRAPHS", "on")
    if value not in ("on", "off"):
        raise InputError(f"COLLAB_GRAPHS={value}: expected on or off")
    return value == "on"


def _packed(model: Llama | PackedLlama, weight_dtype: str, invariant: bool | None) -> PackedLlama:
    if isinstance(model, PackedLlama):
        return model
    on_cpu = model.device.type == "cpu"
    if on_cpu and weight_dtype == "auto" and not _fits_memory(model):
        weight_dtype = "plain"
    if invariant is None:
        invariant = on_cpu and weight_dtype != "plain"
    return PackedLlama(model, weight_dtype, invariant)


def _fits_memory(model: Llama) -> bool:
    """Whether packed copies of the model's weights fit into the memory that is free now."""
    free = free_memory()
    itemsize = 4 if lossless_dtype(model.dtype) == "float32" else 2
    return free is None or sum(p.numel() for p in model.parameters()) * itemsize * 1.1 < free
