"""One optimizer step of a whole model and its kernel launches: `python -m benchmarks.optimizer_step [--save]`.

Weights and gradients are bfloat16; the states are PyTorch's fused AdamW's and ours in bfloat16, rounded stochastically.
A step has to move 14 bytes a weight: it reads weight, gradient and two moments and writes all but the gradient.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import header, save
from minillama.cli import Parser
from minillama.errors import exit_code
from minillama.machine import pick_device
from minillama.model import Llama
from train.config import Settings
from train.distributed import DistributedContext
from train.memory import shape_of
from train.optim import Optimizer


class Launches(TorchDispatchMode):
    """Counts the operations that compute; on a GPU each launches one kernel or a few."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def measure(shape: str, device: torch.device, state: str, rounds: int) -> dict[str, Any]:
    """Median seconds of a step, its operations, and the peak of its temporary tensors in bytes (0 on a CPU)."""
    model = Llama(shape_of(shape)).to(device, torch.bfloat16)
    optimizer = Optimizer(model, Settings(clip=0.0, optimizer_state=state), DistributedContext(device=device))
    seconds, temporary, launches = [], 0, Launches()
    for number in range(rounds + 2):  # the first step makes the states, the operations of the second are counted
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
            parameter.grad = torch.full_like(parameter, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            temporary = -torch.cuda.memory_allocated()
        started = time.perf_counter()
        if number == 1:
            with launches:
                optimizer.step()
        else:
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            temporary += torch.cuda.max_memory_allocated()
        seconds.append(time.perf_counter() - started)
    parameters = sum(p.numel() for p in model.parameters())
    result = {"parameters": parameters, "operations": launches.count, "temporary_bytes": temporary}
    return {**result, "seconds": statistics.median(seconds[2:])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.optimizer_step", description="Time one optimizer step of a model.")
    parser.add_argument("--shape", default="llama-3.2-1b", help="a shape that train.plan knows (llama-3.2-1b)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps (5)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/train/")
    options = parser.parse_args(argv)
    run = options.shape, pick_device(options.device)
    states = {name or "fused": measure(*run, name, options.rounds) for name in ("", "bfloat16")}
    result = {**header(), "shape": options.shape, "optimizer_step": states}
    print(json.dumps(result, indent=1))
    if options.save:
        print(f"saved as {save(result, 'train')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
