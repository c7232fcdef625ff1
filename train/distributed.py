"""One process or several: ranks, their collective calls, and the sharding of the model (FSDP2).

`torchrun` sets the environment; without it there is one rank and no process group, and every call is the identity.
Ranks share one file system. Gradients are summed, not averaged: the loss is divided by the target tokens of all ranks.
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
class DistributedContext:
    """This process among all that train one model. `files`: a separate gloo group for the checkpoint threads."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    files: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on all ranks. An InputError, raised on rank 0, ends all."""
        if self.size == 1:
            return action()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = action()
            except InputError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.files)
        if box[1] is not None:
            raise box[1] if self.is_main else SystemExit(2)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, over the group of the checkpoint threads."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.files)
        return values

    def log(self, text: str) -> None:
        """Print a line to standard error, on rank 0 only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def started(device: str) -> Iterator[DistributedContext]:
    """Join the process group of torchrun, if there is one. `device`: as in pick_device; each rank uses its own GPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    target = pick_device(device)
    if target.type == "cuda":  # sum in a fixed order, as a CPU does, so that a resumed run gives the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if size == 1:
        yield DistributedContext(device=target)
        return
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(target)
    dist.init_process_group("cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo")
    files = dist.new_group(backend="gloo")
    try:
        yield DistributedContext(dist.get_rank(), size, target, files)
        dist.barrier(group=files)  # a rank that ends early would break the others' last calls
    finally:
        dist.destroy_process_group()


class Loss(nn.Module):
    """`function(model, batch)` as one module, so that FSDP also gathers the output layer for the loss."""

    def __init__(self, model: Llama, function: Callable[[Llama, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


def shard(loss: Loss, world: DistributedContext) -> None:
    """Shard every weight over the ranks; layers are gathered one at a time while they compute. One rank: no change."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in loss.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def reshard(loss: Loss) -> None:
    """Free the weights that a forward pass without a backward left gathered."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(loss, FSDPModule):
        loss.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective call if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(model: Llama, world: DistributedContext, structure: Callable[[], Llama]) -> Llama | None:
    """The model with full weights on the CPU, on rank 0; None on other ranks. All ranks must call it.

    structure: makes a model with the same modules; it is called on the meta device.
    """
    if world.size == 1:
        return model
    result = None
    if world.is_main:
        with torch.device("meta"):
            result = structure()
        result.stop_tokens = model.stop_tokens
    for name, parameter in model.named_parameters():
        tensor = full_tensor(parameter.detach())
        if result is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(owner), leaf, nn.Parameter(tensor.cpu()))
        del tensor
    return result
