"""AdamW with float32 or bfloat16 states, updating all weights after backward or each weight within it.

bfloat16 is rounded stochastically. Round-to-nearest would lose updates: with beta2 = 0.999 the second moment moves by a
thousandth per step, and neighbouring bfloat16 numbers are 1/256 apart. The random numbers are a function of (seed,
step, weight), so a resumed run samples the same ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Settings
from train.distributed import DistributedContext, local

# Weights that StochasticAdamW updates at a time. Their float32 copies take TEMPORARY_BYTES each.
GROUP_SIZE = 1 << 22
TEMPORARY_BYTES = 16
MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Of step 1..total: linear warm-up, then constant or a half cosine down to `min_lr_ratio` of the peak."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


class Optimizer:
    """AdamW over a model's trainable weights: weight decay on matrices, none on norms and biases.

    Call `prepare` before the last backward of a step and `step` after it. With `release_gradients` (optimizer in
    backward) each weight is updated during that backward, as soon as its gradient is complete, and the gradient freed.
    """

    def __init__(self, model: nn.Module, settings: Settings, world: DistributedContext) -> None:
        self.world, self.settings = world, settings
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.in_backward = settings.release_gradients
        self.prepared = False
        self.squared_norms: list[Tensor] = []
        # one AdamW for all weights, or one for each weight that backward can step alone
        self.adamw_of: dict[str, torch.optim.Optimizer] = {}
        if self.in_backward:
            for name, parameter in self.parameters.items():
                self.adamw_of[name] = adamw = _adamw({name: parameter}, settings)
                parameter.register_post_accumulate_grad_hook(self._step_hook(adamw))
        else:
            self.adamw_of = dict.fromkeys(self.parameters, _adamw(self.parameters, settings))

    def prepare(self, rate: float) -> None:
        """Set the learning rate; an optimizer in backward steps during the next backward."""
        for adamw in self.adamw_of.values():
            for group in adamw.param_groups:
                group["lr"] = rate
        self.prepared, self.squared_norms = True, []

    def norm(self, limit: float) -> Tensor:
        """Euclidean norm of all gradients, which are scaled down to `limit` if it is exceeded (0: no limit)."""
        if self.in_backward:
            total = self.world.all_reduce_sum([float(torch.stack(self.squared_norms).sum())])[0]
            return torch.tensor(total).sqrt()
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit or float("inf"))

    def step(self) -> None:
        if not self.in_backward:
            adamw = next(iter(self.adamw_of.values()))
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        self.prepared = False

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, zero before the first step: what a checkpoint holds, and loads in place."""
        found = {}
        for name, adamw in self.adamw_of.items():
            parameter = self.parameters[name]
            if not adamw.state[parameter]:
                adamw.state[parameter] = fresh_state(parameter, self.settings)
            for key in MOMENTS:
                found[f"optimizer.{key}.{name}"] = adamw.state[parameter][key]
        return found

    def set_step(self, step: int) -> None:
        """Set the number of steps that a loaded state has seen."""
        for name, adamw in self.adamw_of.items():
            adamw.state[self.parameters[name]]["step"].fill_(step)

    def _step_hook(self, adamw: torch.optim.Optimizer) -> Any:
        def step(parameter: Tensor) -> None:
            if self.prepared and parameter.grad is not None:
                norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
                self.squared_norms.append(norm.square())
                adamw.step()
                parameter.grad = None

        return step


def _adamw(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not settings.optimizer_state:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)
    return StochasticAdamW(groups, settings, {parameter: hash_of(name) for name, parameter in parameters.items()})


def fresh_state(parameter: nn.Parameter, settings: Settings) -> dict[str, Tensor]:
    """The state before the first step; the moments of a vector are float32 where `optimizer_state` is given."""
    dtype, step = parameter.dtype, torch.zeros((), device=parameter.device)
    if settings.optimizer_state:
        dtype = getattr(torch, settings.optimizer_state) if parameter.dim() >= 2 else torch.float32
        step = torch.zeros(())
    return {"step": step, **{key: torch.zeros_like(parameter.detach(), dtype=dtype) for key in MOMENTS}}


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32 and keeps its moments in float32 or bfloat16 (`optimizer_state`).

    Moments and weights in bfloat16 are rounded stochastically. Vectors (norms, biases) have float32 moments. A step
    updates groups of at most GROUP_SIZE weights with about 25 operations each, so its temporary tensors take at most
    GROUP_SIZE * TEMPORARY_BYTES (64 MiB), whatever the size of the model.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: Settings, seeds: dict[nn.Parameter, int]) -> None:
        betas = settings.beta1, settings.beta2
        super().__init__(groups, {"lr": settings.lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.settings, self.seeds = settings, seeds

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter] = fresh_state(parameter, self.settings)
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        weights = local(parameter)
        generator = torch.Generator(weights.device).manual_seed(
            (self.settings.seed * 1_000_003 + step) * 1_000_003 + self.seeds[parameter] & (1 << 63) - 1
        )
        assert parameter.grad is not None
        gradient, *updated = (
            local(tensor) for tensor in (parameter.grad, weights, state["exp_avg"], state["exp_avg_sq"])
        )
        flat = [gradient.reshape(-1), *(tensor.view(-1) for tensor in updated)]
        for tensors in zip(*(tensor.split(GROUP_SIZE) for tensor in flat)):
            _update_group(tensors, group, step, generator)


def _update_group(tensors: Sequence[Tensor], group: dict[str, Any], step: int, generator: torch.Generator) -> None:
    """One AdamW step of N weights and their two moments, in place. (Loshchilov and Hutter, ICLR 2019, algorithm 2.)"""
    gradient_N, weight_N, first_N, second_N = tensors
    beta1, beta2 = group["betas"]
    g = gradient_N.float()
    m = first_N.to(torch.float32, copy=True).lerp_(g, 1 - beta1)
    v = second_N.to(torch.float32, copy=True).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    del g  # its memory is used again for the weights
    store_rounded(m, first_N, generator)
    store_rounded(v, second_N, generator)
    denominator = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    w = weight_N.float()
    w.mul_(1 - group["lr"] * group["weight_decay"])
    w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
    if w is not weight_N:
        store_rounded(w, weight_N, generator)


def store_rounded(x: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Copy float32 `x` into `target`; into bfloat16 rounded up or down at random, with the expected value kept."""
    if target.dtype == torch.bfloat16:
        noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
        x = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    target.copy_(x)


def hash_of(name: str) -> int:
    """A number that depends on the name alone, the same in every process."""
    value = 0
    for byte in name.encode():
        value = (value * 1_000_003 + byte) % (1 << 61)
    return value
