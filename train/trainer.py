"""The training loop: one optimizer step after another over a data order that is a function of the step number.

CPT and SFT differ only in their examples.
- The loss of an optimizer step is the sum over all its micro-batches, on all ranks, divided by the number of their
  labels, so it does not depend on how the step is split.
- A checkpoint has everything that decides the next step, so a killed run resumes to the same weights.
- `metrics.jsonl` holds what was computed and nothing that depends on a clock.
- SIGINT and SIGTERM let the current step finish and save a checkpoint before the run ends.
"""

import hashlib
import math
import signal
import statistics
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import linear_cross_entropy
from minillama.errors import InputError, Interrupted
from minillama.model import Llama
from train.checkpoint import Checkpoints, Progress
from train.config import CHANGEABLE_ON_RESUME, Settings
from train.data import Schedule
from train.distributed import DistributedContext, Loss, full_tensor, reshard, shard
from train.metrics import Records, Reporter
from train.optim import Optimizer, learning_rate
from train.packing import Batch, Example

# A gradient norm is a spike if it exceeds SPIKE times the median of the last RECENT steps' norms (at least FEWEST of
# them): a median, so that one spike does not hide the next.
SPIKE, RECENT, FEWEST = 4.0, 50, 10
# A terminal sends Ctrl-C to every process of its group, and torchrun sends it to each again: within this many seconds a
# second signal is the same request.
SAME_REQUEST_SECONDS = 1.0


def target_loss(model: Llama, batch: Batch) -> Tensor:
    """Sum over labels of -log p(label), nats, float32 (float64 for a model in float64).

    The output layer computes label positions only, in chunks. A sum, not a mean: the caller divides by the number of
    labels of the whole optimizer step.
    """
    hidden_BTD = model.hidden(batch.inputs_BT, packed=batch.packed)
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, batch.label_positions_M)
    return linear_cross_entropy(hidden_MD, model.output_weight, batch.labels_M)


class StopRequest:
    """Within its block the first SIGINT or SIGTERM sets `made`; a later one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.made = False
        self.time = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.made and now - self.time > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self.time = True, now


class Stopped(Exception):
    """A stop was requested, and the checkpoint of the current step is saved."""


class Trainer:
    """One run over fixed examples. `run()` trains to the end, from the start or from the last checkpoint."""

    def __init__(
        self,
        model: Llama,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: Settings,
        output: Path,
        world: DistributedContext | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.model, self.settings, self.output, self.tensorboard = model, settings, output, tensorboard
        self.world = world or DistributedContext(device=model.device)
        self.schedule = Schedule(examples, settings, self.world.rank, self.world.size)
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
        self.records: Records | None = None  # of rank 0, while it trains
        self.stop = StopRequest()

    def run(self, resume: bool, reporter: Reporter) -> Progress:
        """Train; afterwards the model has the last or the best weights. Raises InputError if the loss is not finite."""
        self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self._restore()
        progress = self.progress
        self.model.train()
        self.reporter = reporter
        reporter.start(progress.step, self.total_steps)
        try:
            with self.stop:
                self._train()
        except (KeyboardInterrupt, Stopped) as end:
            if not self.world.is_main:
                raise SystemExit(130) from None
            saved = self.checkpoints.saved_step
            how = "interrupted" if isinstance(end, KeyboardInterrupt) else "stopped and saved"
            raise Interrupted(
                f"{how} at step {progress.step} of {self.total_steps}; to resume from "
                f"{f'step {saved}' if saved else 'the start'}, repeat the command with --resume --output {self.output}"
            ) from None
        finally:
            reporter.stop()
            self.checkpoints.join()
        if self.settings.keep == "best" and progress.best_step not in (0, progress.step):
            self.checkpoints.load(progress.best_step, self._weights())
        self.model.eval()
        return progress

    def _train(self) -> None:
        progress, device = self.progress, self.world.device
        if self.world.is_main:
            self.records = Records(self.output, progress.metrics_bytes, progress.step, device, self.tensorboard)
        try:
            self._evaluate_and_checkpoint_if_due()
            while progress.step < self.total_steps and not progress.stopped:
                self._step()
                self._stop_if_requested()
                self._evaluate_and_checkpoint_if_due()
            self._checkpoint(wait=True)
        finally:
            if self.records is not None:
                self.records.close()

    def _evaluate_and_checkpoint_if_due(self) -> None:
        """Called after each step; a resumed run does first what was due when it was stopped."""
        progress = self.progress
        if progress.step == 0:
            return
        if self.held_out and self._is_due(self.settings.eval_every) and progress.validated_step != progress.step:
            self._validate()
        last = progress.step == self.total_steps or progress.stopped
        if not last and (self._is_due(self.settings.checkpoint_every) or progress.best_step == progress.step):
            self._checkpoint(wait=False)

    def _is_due(self, every: int) -> bool:
        """Whether the step is the last or a multiple of `every`; 0 stands for the end of an epoch."""
        step = self.progress.step
        if step == self.total_steps:
            return True
        return step % every == 0 if every else self.schedule.epoch_of(step)[1] == 0

    def _stop_if_requested(self) -> None:
        """Save and raise Stopped if any rank received a signal."""
        if self.world.all_reduce_sum([float(self.stop.made)])[0] > 0:
            self._checkpoint(wait=True)
            raise Stopped

    def _step(self) -> None:
        progress, settings, world = self.progress, self.settings, self.world
        labels, tokens = self.schedule.num_labels(progress.step), self.schedule.num_tokens(progress.step)
        step = progress.step + 1
        rate = learning_rate(settings, step, self.total_steps)
        batches = list(self.schedule.micro_batches(progress.step))
        losses: list[Tensor] = []
        for number, batch in enumerate(batches, 1):
            loss = self._forward(batch) / labels * world.size  # FSDP averages the ranks' gradients; we need their sum
            losses.append(loss.detach() / world.size)
            if number == len(batches):
                if settings.release_gradients:  # backward updates the weights: this is the last chance to stop
                    self._check_finite(step, losses, 0.0)
                self.optimizer.prepare(rate)
            loss.backward()
        norm = float(full_tensor(self.optimizer.norm(settings.clip)))
        total = self._check_finite(step, losses, norm)
        self.optimizer.step()
        progress.step = step
        record = {"step": step, "loss": total, "grad_norm": norm, "lr": rate, "tokens": tokens, "targets": labels}
        if (ratio := self._spike(norm)) is not None:
            record["spike"] = ratio
            self.reporter.note(
                f"step {step}: gradient norm {norm:.3g}, {ratio:.1f} times the median of the last {RECENT} steps"
            )
        self._record(record)
        self.reporter.step(step, total, tokens)

    def _forward(self, batch: Batch) -> Tensor:
        batch = batch.to(self.world.device)
        compute_dtype = getattr(torch, self.settings.compute_dtype) if self.settings.compute_dtype else self.model.dtype
        with torch.autocast(self.world.device.type, compute_dtype, enabled=compute_dtype != self.model.dtype):
            return self.loss(batch)

    def _check_finite(self, step: int, losses: list[Tensor], norm: float) -> float:
        """The loss summed over all ranks. Raises InputError that names step, micro-batch and examples otherwise."""
        values = torch.stack(losses).double().tolist()
        total = self.world.all_reduce_sum([sum(values)])[0]
        if math.isfinite(total) and math.isfinite(norm):
            return total
        where = ""
        if not all(map(math.isfinite, values)):
            number = [math.isfinite(value) for value in values].index(False)
            examples = ", ".join(str(index + 1) for index in self.schedule.indices_of(step - 1, number))
            where = f" in micro-batch {number + 1} of {len(values)} (examples {examples:.200})"
        self.checkpoints.join()  # its thread uses the same group
        where = max(self.world.gather(where))  # of a rank that has one
        raise InputError(
            f"step {step}: loss {total}{where}, gradient norm {norm}; the run ends here. Start again with a smaller "
            f"--lr in another --output; {self.output} keeps metrics.jsonl and the last good checkpoint, if any"
        )

    def _spike(self, norm: float) -> float | None:
        """The ratio of this step's gradient norm to the median of recent steps, if it is a spike."""
        recent = self.progress.recent_norms
        median = statistics.median(recent) if len(recent) >= FEWEST else math.inf
        self.progress.recent_norms = [*recent, norm][-RECENT:]
        return round(norm / median, 2) if norm > SPIKE * median else None

    @torch.no_grad()
    def _validate(self) -> None:
        """Nats per label over the held-out batches, which are divided among the ranks."""
        progress, world = self.progress, self.world
        self.model.eval()
        total = 0.0
        for first in range(0, len(self.held_out), world.size):
            self._stop_if_requested()
            mine = first + world.rank  # a rank without a batch repeats the last one, uncounted
            value = float(self._forward(self.held_out[min(mine, len(self.held_out) - 1)]))
            total += value if mine < len(self.held_out) else 0.0
        self.model.train()
        reshard(self.loss)
        loss = world.all_reduce_sum([total])[0] / sum(len(batch.labels_M) for batch in self.held_out)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
        else:
            progress.stale += 1
        progress.validated_step = progress.step
        progress.stopped = 0 < self.settings.patience <= progress.stale
        self._record({"step": progress.step, "valid_loss": loss})
        mark = "  (best)" if progress.best_step == progress.step else ""
        self.reporter.note(f"step {progress.step}: validation loss {loss:.4f}{mark}")

    def _record(self, record: dict[str, Any]) -> None:
        if self.records is not None:
            self.records.write(record)

    def _checkpoint(self, wait: bool) -> None:
        progress = self.progress
        self.checkpoints.wait()
        if self.checkpoints.saved_step != progress.step:
            progress.metrics_bytes = self.records.metrics.sync() if self.records is not None else 0
            progress.epoch, progress.position = self.schedule.epoch_of(progress.step)
            self.checkpoints.save(progress, self.fingerprint, self._tensors(), wait)

    def _weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.optimizer.parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors that decide the next step; they share memory with their owners, except the generator's state."""
        return {**self._weights(), **self.optimizer.tensors(), "generator": torch.get_rng_state()}

    def _restore(self) -> None:
        state = self.checkpoints.newest()
        if state is None:
            return
        saved, now = state["fingerprint"], self.fingerprint
        if changed := [f"{n} (was {saved.get(n)}, now {now[n]})" for n in now if saved.get(n) != now[n]]:
            raise InputError(f"--resume {self.output}: the run was started with other settings: {', '.join(changed)}")
        self.progress = Progress(**state["progress"])
        tensors = self._tensors()
        self.checkpoints.load(self.progress.step, tensors)
        self.optimizer.set_step(self.progress.step)
        torch.set_rng_state(tensors["generator"])


def _fingerprint(model: Llama, examples: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint: settings, examples, and frozen weights."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray([example.prompt_len, *example.tokens], dtype=np.int64).tobytes())
    frozen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            frozen = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data, frozen)
    values = {name: value for name, value in asdict(settings).items() if name not in CHANGEABLE_ON_RESUME}
    return {**values, "examples": digest.hexdigest()[:16], "frozen_weights": frozen}
