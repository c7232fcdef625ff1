"""The loop: one optimizer step after another over a data order that is a function of the step number.

CPT and SFT differ in their examples only. What is notable:
- the loss of an optimizer step is the sum over all its micro-batches divided by the targets of all of them, so how a
  step is cut into micro-batches does not change it;
- everything that decides the next step is in a checkpoint, so a killed run goes on to the same weights;
- `metrics.jsonl` holds what was computed and nothing that depends on the clock.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from minillama import InputError, Llama
from minillama.errors import Interrupted
from train.checkpoint import Progress, load_checkpoint, save_checkpoint
from train.data import Batch, Example, Schedule
from train.loss import mean_loss, target_loss
from train.report import Reporter
from train.settings import DTYPES, Settings


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports."""

    steps: int
    epochs: int
    best_loss: float | None
    best_step: int | None
    seconds: float


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Of step 1..total: linear warm-up, then constant or a half cosine down to `min_lr_ratio` of the peak."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def make_optimizer(model: Llama, settings: Settings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on norms and biases."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


class Trainer:
    """One run over fixed examples. `run()` trains to the end, or goes on from the last checkpoint in `output`."""

    def __init__(
        self, model: Llama, examples: Sequence[Example], held_out: Sequence[Example], settings: Settings, output: Path
    ) -> None:
        if not examples:
            raise InputError("there is nothing to train on: no example is left after reading")
        self.model, self.settings, self.output = model, settings, output
        self.device = model.device
        self.optimizer = make_optimizer(model, settings)
        self.schedule = Schedule(
            examples,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            packing=settings.packing,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
        self.total_steps = self.schedule.total_steps
        self.held_out = self.schedule.held_out(held_out)
        self.progress = Progress()
        self.saved_step = 0
        self.best_weights: dict[str, Tensor] | None = None

    def run(self, resume: bool, reporter: Reporter) -> Outcome:
        """Train; the model holds the chosen weights afterwards. Raises InputError when the loss is not finite."""
        self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self._restore()
        started, progress, settings = time.monotonic(), self.progress, self.settings
        self.model.train()
        reporter.start(progress.step, self.total_steps)
        try:
            self._train(reporter)
        except KeyboardInterrupt:
            at = f"after step {self.saved_step}" if self.saved_step else "of its start"
            raise Interrupted(
                f"interrupted at step {progress.step} of {self.total_steps}; the run goes on from the state {at} with "
                f"--resume --output {self.output}"
            ) from None
        finally:
            reporter.stop()
        if settings.keep == "best" and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        known = progress.best_step > 0
        return Outcome(
            steps=progress.step,
            epochs=settings.epochs,
            best_loss=progress.best_loss if known else None,
            best_step=progress.best_step if known else None,
            seconds=time.monotonic() - started,
        )

    def _train(self, reporter: Reporter) -> None:
        progress, settings = self.progress, self.settings
        with open(self.output / "metrics.jsonl", "r+" if progress.step else "w", encoding="utf-8") as metrics:
            metrics.seek(progress.metrics_bytes)
            metrics.truncate()
            while progress.step < self.total_steps and not progress.stopped:
                self._step(metrics, reporter)
                if self.held_out and self._due(settings.eval_every):
                    self._validate(metrics, reporter)
                if progress.step < self.total_steps and self._due(settings.checkpoint_every):
                    self._checkpoint(metrics)
            self._checkpoint(metrics)

    def _due(self, every: int) -> bool:
        """Whether `every` steps are full; 0 stands for an epoch. The last step always is."""
        step = self.progress.step
        if step == self.total_steps:
            return True
        return step % every == 0 if every else self.schedule.epoch_of(step)[1] == 0

    def _step(self, metrics: TextIO, reporter: Reporter) -> None:
        progress, settings = self.progress, self.settings
        targets, tokens = self.schedule.targets(progress.step), self.schedule.tokens(progress.step)
        step = progress.step + 1
        loss = torch.zeros((), device=self.device)
        for batch in self.schedule.micro_batches(progress.step):
            part_loss = self._forward(batch.to(self.device)) / targets
            part_loss.backward()
            loss += part_loss.detach()
        limit = settings.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        loss_value, norm_value = float(loss), float(norm)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise InputError(
                f"step {step}: loss {loss_value}, gradient norm {norm_value}; the run stops here. Start again with a "
                f"smaller --lr in another --output; {self.output} keeps metrics.jsonl and the last checkpoint, if any"
            )
        rate = learning_rate(settings, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step = step
        _write(
            metrics,
            {
                "step": step,
                "loss": loss_value,
                "grad_norm": norm_value,
                "lr": rate,
                "tokens": tokens,
                "targets": targets,
            },
        )
        reporter.step(step, loss_value, tokens, targets)

    def _forward(self, batch: Batch) -> Tensor:
        compute = DTYPES.get(self.settings.compute_dtype)
        if compute is None or compute == self.model.dtype:
            return target_loss(self.model, batch)
        with torch.autocast(self.device.type, dtype=compute):
            return target_loss(self.model, batch)

    def _validate(self, metrics: TextIO, reporter: Reporter) -> None:
        progress = self.progress
        self.model.eval()
        loss = mean_loss(self.model, self.held_out, self.device)
        self.model.train()
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            if self.settings.keep == "best":
                self.best_weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        else:
            progress.stale += 1
        progress.stopped = 0 < self.settings.patience <= progress.stale
        _write(metrics, {"step": progress.step, "valid_loss": loss})
        reporter.validation(progress.step, loss, progress.best_loss)

    def _checkpoint(self, metrics: TextIO) -> None:
        if self.saved_step == self.progress.step:
            return
        metrics.flush()
        self.progress.metrics_bytes = metrics.tell()
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best_weights,
            "fingerprint": self._fingerprint(),
        }
        save_checkpoint(self.output, self.progress, state)
        self.saved_step = self.progress.step

    def _restore(self) -> None:
        if (found := load_checkpoint(self.output)) is None:
            return
        progress, state = found
        changed = [
            f"{name} (was {state['fingerprint'].get(name)}, now {value})"
            for name, value in self._fingerprint().items()
            if state["fingerprint"].get(name) != value
        ]
        if changed:
            raise InputError(f"--resume {self.output}: the run was started with other settings: {', '.join(changed)}")
        self.progress, self.saved_step = progress, progress.step
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_weights = state["best"]

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        free = ("checkpoint_every", "save_dtype")
        return {name: value for name, value in self.settings.as_dict().items() if name not in free} | {
            "examples": len(self.schedule.examples),
            "tokens": sum(len(example.tokens) for example in self.schedule.examples),
        }


def _write(metrics: TextIO, record: dict[str, Any]) -> None:
    metrics.write(json.dumps(record) + "\n")
