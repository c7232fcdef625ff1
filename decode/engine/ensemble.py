"""Members of an ensemble, and how they choose a token together: from one weighted sum of their logits.

Models are prepared for decoding here (prepare.py), each once, whatever the number of members it is. Nothing here knows
texts, prompts' origin or which sentence a row belongs to.
"""

# N members  R rows of logits  V vocabulary

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decode.engine.expression import parse, spell
from decode.lanes import Lanes
from decode.model.packed_llama import PreparedLlama
from kernels import Sampling, describe_flag, fused_logits
from kernels.cpu.packed_linear import lossless_storage
from kernels.types import MAX_MEMBERS
from minillama import InputError, Llama

if TYPE_CHECKING:
    from decode.engine.cuda_graph import StepGraphs


@dataclass(frozen=True)
class Member:
    """One model and its weight in the sum. Prompts and positions are its own, generated tokens are shared."""

    name: str
    model: PreparedLlama
    weight: float


@dataclass(frozen=True)
class Choice:
    """A token for each row and its log-probability in nats under the combined distribution, on the host."""

    tokens: list[int]
    logprobs: list[float]


class Ensemble:
    """`Ensemble({"L": model_l, "S": model_s}, combine="L + S")`: members that choose from one weighted sum of logits.

    Models that the expression gives weight zero are dropped. A `Llama` is prepared for decoding: it stays as it is, and
    on a CPU with room for it packed copies of its weights are made (storage: see `PreparedLlama`).
    invariant: a sentence's result has the same bits whatever it is decoded beside; None: where that costs nothing, on a
    CPU.   graphs: whether plain steps are CUDA graphs (decode/step_graph.py); None: where all members are on one GPU,
    unless COLLAB_GRAPHS=off; True elsewhere: run what a graph would replay.   lanes: whether members on a CPU with
    several threads may go side by side (decode/lanes.py).
    Raises InputError for an expression that does not parse and for vocabularies of different sizes (equal tables are
    the caller's to check: see decode.pipeline.vocabulary).
    """

    def __init__(
        self,
        models: Mapping[str, Llama | PreparedLlama],
        combine: str | Mapping[str, float] | None = None,
        storage: str = "auto",
        invariant: bool | None = None,
        graphs: bool | None = None,
        lanes: bool = True,
    ) -> None:
        if combine is None:
            combine = " + ".join(models)
        weights = parse(combine, models) if isinstance(combine, str) else dict(combine)
        if len(weights) > MAX_MEMBERS:
            raise InputError(f"{len(weights)} models in one ensemble; at most {MAX_MEMBERS} can be summed")
        sizes = {name: models[name].config.vocab_size for name in weights}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise InputError(f"the models' vocabularies differ in size ({listed}); members must share one vocabulary")
        prepared: dict[int, PreparedLlama] = {}
        for name in weights:
            if id(models[name]) not in prepared:
                prepared[id(models[name])] = _prepared(models[name], storage, invariant)
        self.members = tuple(Member(name, prepared[id(models[name])], weight) for name, weight in weights.items())
        self.weights_N = torch.tensor([m.weight for m in self.members], dtype=torch.float32, device=self.device)
        devices = {member.model.device for member in self.members}
        if graphs is None:
            graphs = self.device.type == "cuda" and graphs_wanted()
        # The processes that hold the parts of members which are split; all choose what the first of them chooses.
        self.part = next((member.model.part for member in self.members if member.model.part is not None), None)
        self.graphs = graphs and len(devices) == 1 and self.part is None
        used = [member.model for member in self.members]
        self._lanes = Lanes([model.nbytes for model in used], [model.average_weight for model in used])
        self._may_part = lanes and self.part is None and {device.type for device in devices} == {"cpu"}
        # What the last call decoded with, for the next one: graphs are bound to their caches (decode/rows.py).
        self.step_graphs: StepGraphs | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def weights(self) -> dict[str, float]:
        return {member.name: member.weight for member in self.members}

    @property
    def combine(self) -> str:
        return spell(self.weights)

    @property
    def device(self) -> torch.device:
        """Where logits are summed: the first member's device."""
        return self.members[0].model.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        """What ends a text for any member: to a model that reads a token as the end, nothing behind it makes sense."""
        return frozenset(token for member in self.members for token in member.model.stop_tokens)

    @property
    def context(self) -> dict[str, int]:
        """Positions that each member was made for."""
        return {member.name: member.model.config.max_position_embeddings for member in self.members}

    def choose(self, logits: Sequence[Tensor], sample: Sampling | None = None, weights: Tensor | None = None) -> Choice:
        """The next token of every row of logits, a tensor (R, V) for each member: the best one, or a draw.

        weights: of the logits given, where they are not the ensemble's.

        Raises FloatingPointError for NaN or infinite logits and for a row without a token.
        """
        chosen = fused_logits(logits, self.weights_N if weights is None else weights, sample=sample)
        token_R, logprob_R = chosen.token, chosen.logprob
        if chosen.sample_token is not None and chosen.sample_logprob is not None:
            token_R, logprob_R = chosen.sample_token, chosen.sample_logprob
        flag_R, token_R, logprob_R = self._agreed(chosen.flag, token_R, logprob_R)
        self.check(flag_R.tolist())
        return Choice(token_R.tolist(), logprob_R.tolist())

    def best(self, logits: Sequence[Tensor], count: int) -> list[list[tuple[int, float]]]:
        """For every row of logits the `count` best tokens (fewer where the others are masked), log-probabilities in
        nats; raises as `choose` does.
        """
        found = fused_logits(logits, self.weights_N, top_k=count)
        assert found.top_token is not None
        assert found.top_logprob is not None
        flag_R, token_RK, logprob_RK = self._agreed(found.flag, found.top_token, found.top_logprob)
        self.check(flag_R.tolist())
        return [
            [(token, logprob) for token, logprob in zip(tokens, logprobs) if token >= 0]
            for tokens, logprobs in zip(token_RK.tolist(), logprob_RK.tolist())
        ]

    def logprobs(self, logits: Sequence[Tensor], given_RG: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities in nats of given tokens: combined (R, G), and each member's own (N, R, G), on the host.

        Raises as `choose` does.
        """
        one = torch.ones(1, device=self.device)
        asked = [(logits, self.weights_N), *(([of_member], one) for of_member in logits)]
        found = [fused_logits(of, weights, targets=given_RG) for of, weights in asked]
        self.check(found[0].flag.tolist())
        combined_RG, *own = [result.target_logprob for result in found if result.target_logprob is not None]
        return combined_RG.cpu(), torch.stack(own).cpu()

    def lanes(self, positions: int) -> Lanes | None:
        """Where members go side by side in a pass of so many positions, with as many threads as PyTorch has now; None:
        one after another.
        """
        lanes = self._lanes
        return lanes if self._may_part and positions >= lanes.least_rows and lanes.plan() is not None else None

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """Numbers that all processes of a split member go on with: those of the first."""
        if self.part is None:
            return list(numbers)
        return self.part.broadcast(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def _agreed(self, *results: Tensor) -> Sequence[Tensor]:
        if self.part is None:
            return results
        flat = self.part.broadcast(torch.cat([result.flatten().double() for result in results]))  # loses no bit
        parts = flat.split([result.numel() for result in results])
        return [part.view(result.shape).to(result.dtype) for part, result in zip(parts, results)]

    def check(self, flags: Sequence[int]) -> None:
        """Raises FloatingPointError for the first row with a flag, naming the member at fault."""
        if any(flags):
            row = next(row for row, flag in enumerate(flags) if flag)
            raise FloatingPointError(f"row {row}: {describe_flag(flags[row], self.names)}")


def graphs_wanted() -> bool:
    """Whether COLLAB_GRAPHS leaves CUDA graphs on; raises InputError for a value that means nothing."""
    wanted = os.environ.get("COLLAB_GRAPHS", "on")
    if wanted not in ("on", "off"):
        raise InputError(f"COLLAB_GRAPHS={wanted}: expected on or off")
    return wanted == "on"


def _prepared(model: Llama | PreparedLlama, storage: str, invariant: bool | None) -> PreparedLlama:
    if isinstance(model, PreparedLlama):
        return model
    on_cpu = model.device.type == "cpu"
    if on_cpu and storage == "auto" and not _has_room(model):
        storage = "plain"
    if invariant is None:
        invariant = on_cpu and storage != "plain"
    return PreparedLlama(model, storage, invariant)


def _has_room(model: Llama) -> bool:
    """Whether packed copies of the model's weights fit into the memory that is free now."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return True
    itemsize = 4 if lossless_storage(model.dtype) == "float32" else 2
    packed = sum(p.numel() for p in model.parameters()) * itemsize
    return packed * 1.1 < free
