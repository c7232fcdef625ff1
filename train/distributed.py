"""One process or many: who this rank is, what ranks agree on, and the model cut into shards (FSDP2).

`torchrun` sets the environment; without it there is one rank and no process group, and everything here is the identity.
Ranks share one file system. Gradients are summed, not averaged: the loss is divided by the targets of all ranks.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minillama import InputError, Llama
from minillama.machine import pick_device

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process among all that train one model. `files`: a gloo group of its own, for checkpoints' threads."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    files: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def first(self, action: Callable[[], T]) -> T:
        """What rank 0 gets from `action`, on all ranks. An InputError there ends every rank; rank 0 says why."""
        if self.size == 1:
            return action()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = action()
            except InputError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.files)
        if box[1] is not None:
            raise box[1] if self.main else SystemExit(2)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, over the checkpoints' group."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.files)
        return values

    def say(self, text: str) -> None:
        """A line on standard error, from rank 0 alone."""
        if self.main:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def started(device: str) -> Iterator[World]:
    """The world of this process. `device`: as in pick_device; of many ranks each takes its local rank's GPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        _same_bits_every_time()
    if size == 1:
        yield World(device=chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    files = dist.new_group(backend="gloo")
    try:
        yield World(dist.get_rank(), size, chosen, files)
        dist.barrier(group=files)  # nobody leaves while another still talks to him
    finally:
        dist.destroy_process_group()


def _same_bits_every_time() -> None:
    """Have a GPU add in a fixed order, as a CPU does: a resumed run is to come to the bits of the unbroken one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Loss(nn.Module):
    """The whole of model and loss as one module, so that FSDP's hooks surround the output layer too.

    The call takes what `function(model, batch)` takes after the model and gives the sum over this rank's targets.
    """

    def __init__(self, model: Llama, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *batch: Any) -> Tensor:
        return self.function(self.model, *batch)


def shard(loss: Loss, world: World) -> None:
    """Cut every weight into one part a rank, gathered layer by layer while it is needed. One rank: nothing is done."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in loss.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def reshard(loss: Loss) -> None:
    """Drop what the last forward pass gathered: after one without a backward the outer weights are still whole."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(loss, FSDPModule):
        loss.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective call where it is cut)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, model: Tensor, shape: Sequence[int]) -> Tensor:
    """`part` as this rank's rows of a tensor of `shape`, cut as `model` is; `part` itself where that is not cut."""
    if not isinstance(model, DTensor):
        return part
    size = torch.Size(shape)
    strides = torch.empty(size, device="meta").stride()
    return DTensor.from_local(part, model.device_mesh, model.placements, run_check=False, shape=size, stride=strides)


def unsharded(model: Llama, world: World, structure: Callable[[], Llama]) -> Llama | None:
    """The model with full weights on the CPU, on rank 0; None elsewhere. All ranks must call it.

    structure: makes a model of the same modules; it is called on the meta device.
    """
    if world.size == 1:
        return model
    result = None
    if world.main:
        with torch.device("meta"):
            result = structure()
        result.stop_tokens = model.stop_tokens
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if result is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(owner), leaf, nn.Parameter(tensor.cpu()))
        del tensor
    return result
