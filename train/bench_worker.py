"""One system of `train.bench` in a process of its own: it holds a model and an optimizer and takes steps when asked.

Ours and transformers' differ in `Ours` and `Theirs` alone: model, batch layout and loss. Optimizer (fused AdamW, the
same groups), clipping, weights and data are the same.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import Example

# What our system does for a batch, each with all that stands before it: `train.bench` says what each brings.
LAYOUTS = ("padded", "target-only output", "packed", "shared prefix")


@dataclass(frozen=True)
class Setup:
    """What a worker needs to start. `threads` 0: PyTorch's choice."""

    system: str
    folder: str
    device: str
    dtype: str
    threads: int
    lr: float


class System(Protocol):
    """`loss` is the mean over all targets of the examples, ready for backward."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, examples: Sequence[Example], layout: str) -> Tensor: ...


class Ours:
    def __init__(self, setup: Setup, device: torch.device) -> None:
        from minillama import Llama

        self.device = device
        self.model = Llama.from_pretrained(setup.folder, dtype=getattr(torch, setup.dtype), device=device)

    def loss(self, examples: Sequence[Example], layout: str = LAYOUTS[-1]) -> Tensor:
        from train.loss import target_loss
        from train.packing import collate, pack

        targets = sum(example.targets for example in examples)
        if layout in ("packed", "shared prefix"):
            batch = pack(examples, share_prefix=layout == "shared prefix").to(self.device)
            return target_loss(self.model, batch) / targets
        batch = collate(examples).to(self.device)
        if layout == "target-only output":
            return target_loss(self.model, batch) / targets
        logits_RV = self.model(batch.inputs_BT).flatten(0, 1)
        label_R = logits_RV.new_full((len(logits_RV),), -100, dtype=torch.int64)
        label_R[batch.target_rows_M] = batch.targets_M
        return F.cross_entropy(logits_RV.float(), label_R)


class Theirs:
    """transformers' own model and loss, as its Trainer calls them: padded to the longest, labels -100 elsewhere.

    One thing is set right: it drops the embedding's gradient of the pad token wherever that stands, which for SmolLM2
    is <|im_end|>, the end of every turn. With that its gradients would not be those of the loss, and no curve the same.
    """

    def __init__(self, setup: Setup, device: torch.device) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.device = device
        dtype = getattr(torch, setup.dtype)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype)
        nn.Module.to(self.model, device)
        embedding: Any = self.model.get_input_embeddings()
        embedding.padding_idx = None

    def loss(self, examples: Sequence[Example], layout: str = "") -> Tensor:
        width = max(len(example.tokens) for example in examples)
        ids_BT = torch.zeros(len(examples), width, dtype=torch.int64)
        mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
        for row, example in enumerate(examples):
            length = len(example.tokens)
            ids_BT[row, :length], mask_BT[row, :length] = torch.tensor(example.tokens), 1
            labels_BT[row, example.first_target : length] = ids_BT[row, example.first_target : length]
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
        return self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()}, use_cache=False).loss


def serve(connection: Connection, setup: Setup) -> None:
    """Answer ("step", examples, layout) with (seconds, loss), ("peak",) with bytes, until the other end closes."""
    # what one of them prints (a warning of a library) is not the benchmark's output
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if setup.threads:
        torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    device = torch.device(setup.device)
    system: System = Ours(setup, device) if setup.system == "ours" else Theirs(setup, device)
    system.model.train()
    matrices = [p for p in system.model.parameters() if p.dim() >= 2]
    vectors = [p for p in system.model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setup.lr, fused=True)
    handlers: dict[str, Callable[..., Any]] = {
        "step": lambda examples, layout: _step(system, optimizer, examples, layout),
        "peak": lambda: peak_and_reset(device),
    }
    reset_peak(device)
    connection.send("ready")
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        connection.send(handlers[name](*arguments))


def _step(
    system: System, optimizer: torch.optim.Optimizer, examples: Sequence[Example], layout: str
) -> tuple[float, float]:
    """One optimizer step: (seconds, loss)."""
    started = time.perf_counter()
    loss = system.loss(examples, layout)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(system.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())  # waits for the device
    return time.perf_counter() - started, value


def peak_and_reset(device: torch.device) -> int:
    found = peak_bytes(device)
    reset_peak(device)
    return found


def reset_peak(device: torch.device) -> None:
    """From here on the peak counts: what loading took is not training's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use since `reset_peak`: the allocator's on a GPU, else the whole process's (proc(5), VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
