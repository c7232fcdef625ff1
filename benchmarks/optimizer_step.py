"""One optimizer step of a whole model and its kernel launches: `python -m benchmarks.optimizer_step [--save]`.

Weights and gradients are bfloat16; the states are PyTorch's fused AdamW's and ours in bfloat16, rounded stochastically.
The bandwidth limit is the time to read weight, gradient and two moments once and to write all but the gradient.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
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

BYTES_PER_WEIGHT = 7 * 2
EXAMPLES = """examples:
  python -m benchmarks.optimizer_step --save                                 Llama 3.2 1B on a GPU
  python -m benchmarks.optimizer_step --shape smollm2-135m --device cpu      some seconds
"""


class Launches(TorchDispatchMode):
    """Counts the operations that compute; on a GPU each launches one kernel or a few."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def measure(shape: str, device: torch.device, state: str, rounds: int) -> dict[str, Any]:
    """Median seconds of a step, its operations, and the peak of its temporary tensors in bytes (on a GPU)."""
    with torch.device("meta"):
        model = Llama(shape_of(shape)).to(torch.bfloat16)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    optimizer = Optimizer(model, Settings(clip=0.0, optimizer_state=state), DistributedContext(device=device))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[float] = []
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for number in range(rounds + 2):  # the first makes the states, the second is counted
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.prepare(1e-5)
        synchronize()
        if number == 1:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with Launches() as launches:
                optimizer.step()
            result["operations"] = launches.count
            if device.type == "cuda":
                result["temporary_bytes"] = torch.cuda.max_memory_allocated() - before
            continue
        started = time.perf_counter()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    result["seconds"] = sorted(seconds[1:])[rounds // 2]
    result["bytes_per_second"] = result["parameters"] * BYTES_PER_WEIGHT / result["seconds"]
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.optimizer_step", description="Time one optimizer step of a model.", epilog=EXAMPLES
    )
    parser.add_argument("--shape", default="llama-3.2-1b", help="a shape that train.plan knows (llama-3.2-1b)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps (5)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/train/")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    states = {name or "fused": measure(options.shape, device, name, options.rounds) for name in ("", "bfloat16")}
    result = {**header(), "shape": options.shape, "optimizer_step": states}
    print(json.dumps(result, indent=1))
    if options.save:
        print(f"saved as {save(result, 'train')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
