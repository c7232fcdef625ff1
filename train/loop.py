"""The loop: one optimizer step after another over a data order that is a function of the step number.

CPT and SFT differ in their examples only. What is notable:
- the loss of an optimizer step is the sum over all its micro-batches, on all ranks, divided by the targets of all of
  them, so how a step is cut does not change it;
- everything that decides the next step is in a checkpoint, so a killed run goes on to the same weights;
- `metrics.jsonl` holds what was computed and nothing that depends on the clock.
"""

import hashlib
import math
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillama import InputError, Llama
from minillama.errors import Interrupted
from train.checkpoint import Checkpoints, Progress
from train.data import Example, Schedule
from train.distributed import Loss, World, reshard, shard, whole
from train.loss import target_loss
from train.optimizer import Optimizer, learning_rate
from train.packing import Batch
from train.report import Lines, Reporter, Timing, tensorboard_writer
from train.settings import DTYPES, FREE, Settings
from train.signals import StopRequest

# A gradient norm is called a spike when it is more than SPIKE times the median of the last NORMS steps' (FEWEST of
# them at least): a median, so that one spike does not hide the next.
SPIKE, NORMS, FEWEST = 4.0, 50, 10


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports."""

    steps: int
    epochs: int
    best_loss: float | None
    best_step: int | None
    seconds: float


class Stopped(Exception):
    """A signal asked for the end, and the step in hand is done."""


class Trainer:
    """One run over fixed examples. `run()` trains to the end, or goes on from the last checkpoint in `output`."""

    def __init__(
        self,
        model: Llama,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: Settings,
        output: Path,
        world: World | None = None,
        tensorboard: bool = False,
    ) -> None:
        if not examples:
            raise InputError("there is nothing to train on: no example is left after reading")
        self.model, self.settings, self.output, self.tensorboard = model, settings, output, tensorboard
        self.world = world or World(device=model.device)
        self.schedule = schedule_of(examples, settings, self.world)
        self.total_steps = self.schedule.total_steps
        self.held_out = self.schedule.held_out(held_out)
        self.fingerprint = _fingerprint(model, examples, settings)
        self.loss = Loss(model, target_loss)
        model.model.checkpoint_activations = settings.checkpoint_activations
        if settings.compile:
            for layer in model.model.layers:
                layer.compile()
        shard(self.loss, self.world)
        self.optimizer = Optimizer(model, settings, self.world)
        self.checkpoints = Checkpoints(output / "checkpoints", settings.keep_checkpoints, self.world)
        self.progress = Progress()
        self.saved_step = 0
        self.stop = StopRequest()

    def run(self, resume: bool, reporter: Reporter) -> Outcome:
        """Train; the model holds the chosen weights afterwards. Raises InputError when the loss is not finite."""
        self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self._restore()
        started, progress = time.monotonic(), self.progress
        self.model.train()
        self.reporter = reporter
        reporter.start(progress.step, self.total_steps)
        try:
            with self.stop:
                self._train()
        except (KeyboardInterrupt, Stopped) as end:
            if not self.world.main:
                raise SystemExit(130) from None
            at = self.checkpoints.saved_step
            kept = f"from step {at}" if at else "from its start"
            how = "interrupted" if isinstance(end, KeyboardInterrupt) else "stopped and saved"
            raise Interrupted(
                f"{how} at step {progress.step} of {self.total_steps}; the run goes on {kept} when its command is "
                f"given again with --resume --output {self.output}"
            ) from None
        finally:
            reporter.stop()
            self.checkpoints.join()
        if self.settings.keep == "best" and progress.best_step not in (0, progress.step):
            self.checkpoints.load(progress.best_step, self._weights())
        self.model.eval()
        known = progress.best_step > 0
        return Outcome(
            steps=progress.step,
            epochs=self.settings.epochs,
            best_loss=progress.best_loss if known else None,
            best_step=progress.best_step if known else None,
            seconds=time.monotonic() - started,
        )

    def _train(self) -> None:
        progress, main = self.progress, self.world.main
        self.metrics = Lines(self.output / "metrics.jsonl", progress.metrics_bytes) if main else None
        self.timing = Timing(self.output, progress.step > 0, self.world.device) if main else None
        self.board = tensorboard_writer(self.output, progress.step + 1) if main and self.tensorboard else None
        try:
            self._settle()
            while progress.step < self.total_steps and not progress.stopped:
                self._step()
                if self._stopping():
                    self._checkpoint(wait=True)
                    raise Stopped
                self._settle()
            self._checkpoint(wait=True)
        finally:
            if self.metrics is not None:
                self.metrics.close()
            if self.timing is not None:
                self.timing.lines.close()
            if self.board is not None:
                self.board.close()

    def _settle(self) -> None:
        """What is due after a step and not yet done: a run that was stopped in between does it when it goes on."""
        progress = self.progress
        if progress.step == 0:
            return
        if self.held_out and self._due(self.settings.eval_every) and progress.validated_step != progress.step:
            self._validate()
        last = progress.step == self.total_steps or progress.stopped
        if not last and (self._due(self.settings.checkpoint_every) or progress.best_step == progress.step):
            self._checkpoint(wait=False)

    def _due(self, every: int) -> bool:
        """Whether `every` steps are full; 0 stands for an epoch. The last step always is."""
        step = self.progress.step
        if step == self.total_steps:
            return True
        return step % every == 0 if every else self.schedule.epoch_of(step)[1] == 0

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.world.total([float(self.stop.made)])[0] > 0

    def _step(self) -> None:
        progress, settings, world = self.progress, self.settings, self.world
        targets, tokens = self.schedule.targets(progress.step), self.schedule.tokens(progress.step)
        step = progress.step + 1
        rate = learning_rate(settings, step, self.total_steps)
        batches = list(self.schedule.micro_batches(progress.step))
        parts: list[Tensor] = []
        for number, batch in enumerate(batches, 1):
            # FSDP takes the mean of the ranks' gradients; what is wanted is their sum.
            part = self._forward(batch) / targets * world.size
            parts.append(part.detach() / world.size)
            if number == len(batches):
                if settings.release_gradients:  # the step is taken in backward: no later chance to refuse it
                    self._check_finite(step, parts, 0.0)
                self.optimizer.prepare(rate)
            part.backward()
        norm = float(whole(self.optimizer.norm(settings.clip)))
        loss = self._check_finite(step, parts, norm)
        self.optimizer.step()
        progress.step = step
        record = {"step": step, "loss": loss, "grad_norm": norm, "lr": rate, "tokens": tokens, "targets": targets}
        if (ratio := self._spike(norm)) is not None:
            record["spike"] = ratio
            self.reporter.note(
                f"step {step}: gradient norm {norm:.3g}, {ratio:.1f} times the median of the last {NORMS} steps'"
            )
        self._record(record)
        if self.timing is not None:
            self.timing.step(step, tokens, targets)
        self.reporter.step(step, loss, tokens, targets)

    def _forward(self, batch: Batch) -> Tensor:
        compute = DTYPES.get(self.settings.compute_dtype)
        batch = batch.to(self.world.device)
        if compute is None or compute == self.model.dtype:
            return self.loss(batch)
        with torch.autocast(self.world.device.type, dtype=compute):
            return self.loss(batch)

    def _check_finite(self, step: int, parts: list[Tensor], norm: float) -> float:
        """The loss of all ranks. Raises InputError that names step, micro-batch and examples if it is not finite."""
        losses = torch.stack(parts).double().tolist()
        loss = self.world.total([sum(losses)])[0]
        if math.isfinite(loss) and math.isfinite(norm):
            return loss
        number = next((number for number, part in enumerate(losses) if not math.isfinite(part)), None)
        place = ""
        if number is not None:
            numbers = [index + 1 for index in self.schedule.indices_of(step - 1, number)]
            shown = ", ".join(map(str, numbers[:16])) + (", …" if len(numbers) > 16 else "")
            place = f" in micro-batch {number + 1} of {len(parts)} (examples {shown})"
        place = next((place for place in self.world.gather(place) if place), "")
        raise InputError(
            f"step {step}: loss {loss}{place}, gradient norm {norm}; the run stops here. Start again with a "
            f"smaller --lr in another --output; {self.output} keeps metrics.jsonl and the last good checkpoint, if any"
        )

    def _spike(self, norm: float) -> float | None:
        recent = self.progress.recent_norms
        median = statistics.median(recent) if len(recent) >= FEWEST else math.inf
        self.progress.recent_norms = [*recent, norm][-NORMS:]
        return round(norm / median, 2) if norm > SPIKE * median else None

    @torch.no_grad()
    def _validate(self) -> None:
        """Nats per target token over the held-out batches, which the ranks share."""
        progress, world = self.progress, self.world
        self.model.eval()
        total = 0.0
        for first in range(0, len(self.held_out), world.size):
            if self._stopping():
                self._checkpoint(wait=True)
                raise Stopped
            mine = first + world.rank  # past the end, a rank goes along with the last batch for nothing
            value = float(self._forward(self.held_out[min(mine, len(self.held_out) - 1)]))
            total += value if mine < len(self.held_out) else 0.0
        self.model.train()
        reshard(self.loss)
        loss = world.total([total])[0] / sum(len(batch.targets_M) for batch in self.held_out)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
        else:
            progress.stale += 1
        progress.validated_step = progress.step
        progress.stopped = 0 < self.settings.patience <= progress.stale
        self._record({"step": progress.step, "valid_loss": loss})
        self.reporter.validation(progress.step, loss, progress.best_loss)

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
        if self.board is not None:
            for name in ("loss", "valid_loss", "grad_norm", "lr"):
                if name in record:
                    self.board.add_scalar(name, record[name], record["step"])

    def _checkpoint(self, wait: bool) -> None:
        progress = self.progress
        if self.saved_step != progress.step:
            progress.metrics_bytes = self.metrics.saved() if self.metrics is not None else 0
            progress.epoch, progress.position = self.schedule.epoch_of(progress.step)
            self.checkpoints.save(progress, self.fingerprint, self._tensors(), wait)
            self.saved_step = progress.step
        if wait:
            self.checkpoints.wait()

    def _weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.optimizer.parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors that decide the next step, sharing memory with their owners (but for the generator's state)."""
        return {**self._weights(), **self.optimizer.tensors(), "generator": torch.get_rng_state()}

    def _restore(self) -> None:
        found = self.checkpoints.newest(self._check_fingerprint)
        if found is None:
            return
        tensors = self._tensors()
        self.checkpoints.load(found.step, tensors)
        self.optimizer.set_step(found.step)
        torch.set_rng_state(tensors["generator"])
        self.progress, self.saved_step = found, found.step

    def _check_fingerprint(self, saved: dict[str, Any]) -> None:
        changed = [
            f"{name} (was {saved.get(name)}, now {value})"
            for name, value in self.fingerprint.items()
            if saved.get(name) != value
        ]
        if changed:
            raise InputError(f"--resume {self.output}: the run was started with other settings: {', '.join(changed)}")


def schedule_of(examples: Sequence[Example], settings: Settings, world: World) -> Schedule:
    return Schedule(
        examples,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        packing=settings.packing,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
    )


def _fingerprint(model: Llama, examples: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run: settings, examples, and weights that are not trained."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray([example.first_target, *example.tokens], dtype=np.int64).tobytes())
    frozen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            frozen = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data, frozen)
    values = {name: value for name, value in settings.as_dict().items() if name not in FREE}
    return {**values, "examples": digest.hexdigest()[:16], "frozen_weights": frozen}
