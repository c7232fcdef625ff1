"""One rank of a run over random examples, for test_ranks.py; the environment is torchrun's.

rank_worker.py train OUTPUT STOP_AT     a run of 50 steps, resumed if OUTPUT has one; stopped as by a signal at STOP_AT
rank_worker.py gradients FILE DTYPE     loss and gradients of one optimizer step, saved whole by rank 0
"""

import sys
from pathlib import Path

import torch
from random_examples import examples_of
from tiny import tiny_model

from minillama.errors import Interrupted
from train.config import Settings
from train.data import Schedule
from train.distributed import Loss, full_tensor, shard, started, unsharded
from train.metrics import Reporter
from train.trainer import Trainer, target_loss

OFTEN = {"eval_every": 6, "checkpoint_every": 4, "keep": "best"}
RUN = Settings(epochs=5, lr=3e-3, batch_size=5, micro_batch_size=2, schedule="cosine", **OFTEN)
EXAMPLES, HELD_OUT = 50, 7


class Stopping(Reporter):
    """Asks for a stop at a step, as SIGTERM does."""

    def __init__(self, at):
        super().__init__(silent=True)
        self.at = at

    def step(self, step, loss, tokens):
        if step == self.at:
            self.trainer.stop.made = True


def train(world, output: Path, stop_at: int) -> None:
    model = tiny_model(3)
    trainer = Trainer(model, examples_of(EXAMPLES), examples_of(HELD_OUT, 9), RUN, output, world)
    reporter = Stopping(stop_at)
    reporter.trainer = trainer
    try:
        trainer.run(True, reporter)
    except (Interrupted, SystemExit):
        return
    result = unsharded(model, world, lambda: tiny_model(3))
    if result is not None:
        result.save_pretrained(output / "final")


def gradients(world, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = tiny_model(1).to(dtype)
    loss = Loss(model, target_loss)
    shard(loss, world)
    schedule = Schedule(
        examples_of(32, 4), Settings(epochs=1, batch_size=32, micro_batch_size=5), world.rank, world.size
    )
    total = 0.0
    for batch in schedule.micro_batches(0):
        part = loss(batch) / schedule.num_labels(0) * world.size
        part.backward()
        total += float(part) / world.size
    found = {name: full_tensor(parameter.grad) for name, parameter in model.named_parameters()}
    found["loss"] = torch.tensor(world.all_reduce_sum([total])[0], dtype=torch.float64)
    return found


def run(world, what: str, path: str, value: str) -> None:
    if what == "train":
        train(world, Path(path), int(value))
    else:
        found = {str(dtype): gradients(world, dtype) for dtype in (torch.float64, torch.float32)}
        if world.is_main:
            torch.save(found, path)


def main() -> None:
    torch.set_num_threads(1)
    with started("cpu") as world:
        run(world, *sys.argv[1:])


if __name__ == "__main__":
    main()
