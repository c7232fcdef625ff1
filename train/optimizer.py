"""AdamW with its state in float32, bfloat16 or 8 bits, and the step either at once or weight by weight in backward.

A state kept in few bits is rounded stochastically: rounding to nearest would lose what one step adds, since with
beta2 = 0.999 the second moment moves by a thousandth and bfloat16 has steps of 1/256. The random numbers are a function
of (seed, step, weight), so a resumed run draws the same ones.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed import World, like, local
from train.settings import Settings

# 8-bit state: blocks of this many numbers along the last axis share one scale. (Dettmers et al., "8-bit Optimizers via
# Block-wise Quantization", ICLR 2022, with a logarithmic table in place of theirs.)
BLOCK = 128
# Factor between neighbouring codes, as a power of two: 127 codes span 2^16 of the first moment, 255 codes 2^32 of the
# second, whose square root then spans as much.
OCTAVES = 16 / 126
# Elements of a weight that are worked on at a time, which bounds the float32 copies of its state.
CHUNK = 1 << 20


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
    """AdamW over a model's trainable weights: decay on matrices, none on norms and biases.

    Call `prepare` before the last backward of a step and `step` after it. With `release_gradients` each weight is
    updated, and its gradient dropped, in that backward, as soon as it is complete.
    """

    def __init__(self, model: nn.Module, settings: Settings, world: World) -> None:
        self.world = world
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.release = settings.release_gradients
        self.armed = False
        self.squares: list[Tensor] = []
        names = list(self.parameters)
        parts = [[name] for name in names] if self.release else [names]
        self.owners = [_adamw([self.parameters[name] for name in part], settings, part) for part in parts]
        if self.release:
            for name, owner in zip(names, self.owners):
                self.parameters[name].register_post_accumulate_grad_hook(self._stepper(owner))

    def prepare(self, rate: float) -> None:
        """Set the learning rate; a releasing optimizer steps during the next backward."""
        for owner in self.owners:
            for group in owner.param_groups:
                group["lr"] = rate
        self.armed, self.squares = self.release, []

    def norm(self, limit: float) -> Tensor:
        """Euclidean norm of all gradients, which are scaled down to `limit` where there is one (0: none)."""
        if self.release:
            return torch.tensor(self.world.total([float(torch.stack(self.squares).sum())])[0]).sqrt()
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit or float("inf"))

    def step(self) -> None:
        if not self.release:
            self.owners[0].step()
            self.owners[0].zero_grad(set_to_none=True)
        self.armed = False

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, made where there is none yet: what a checkpoint holds and fills in place."""
        found = {}
        for name, owner in self._owned():
            parameter = self.parameters[name]
            if not owner.state[parameter]:
                owner.state[parameter] = _fresh_state(owner, parameter)
            for key, tensor in owner.state[parameter].items():
                if key != "step":
                    found[f"optimizer.{key}.{name}"] = tensor
        return found

    def set_step(self, step: int) -> None:
        """Of a state that was loaded: how many steps it has seen, which is the same for all weights."""
        for name, owner in self._owned():
            owner.state[self.parameters[name]]["step"].fill_(step)

    def _owned(self) -> Iterable[tuple[str, torch.optim.Optimizer]]:
        owners = self.owners if self.release else self.owners * len(self.parameters)
        return zip(self.parameters, owners)

    def _stepper(self, owner: torch.optim.Optimizer) -> Any:
        def step(parameter: Tensor) -> None:
            if self.armed and parameter.grad is not None:
                norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
                self.squares.append(norm.square())
                owner.step()
                parameter.grad = None

        return step


def _adamw(parameters: list[nn.Parameter], settings: Settings, names: list[str]) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    if not settings.optimizer_state:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)
    seeds = {p: hash_of(name) for p, name in zip(parameters, names)}
    return CompactAdamW(groups, settings.lr, betas, settings.optimizer_state, settings.seed, seeds)


def _fresh_state(owner: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(owner, CompactAdamW):
        return owner.fresh_state(parameter)
    moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


class CompactAdamW(torch.optim.Optimizer):
    """AdamW computing in float32 on a state of another type: "float32", "bfloat16" or "int8" (about 2 bytes a weight).

    Weights narrower than float32 are rounded stochastically too. Vectors (norms, biases) keep a float32 state.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        kind: str,
        seed: int,
        seeds: dict[nn.Parameter, int],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.kind, self.seed, self.seeds = kind, seed, seeds

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        part = local(parameter.detach())
        state = {"step": torch.zeros(())}
        for key in ("exp_avg", "exp_avg_sq"):
            if self.kind == "int8" and parameter.dim() >= 2:
                blocks = -(-parameter.shape[-1] // BLOCK)
                kind = torch.int8 if key == "exp_avg" else torch.uint8
                state[key] = like(torch.zeros_like(part, dtype=kind), parameter, parameter.shape)
                scales = torch.zeros(*part.shape[:-1], blocks, dtype=torch.float32, device=part.device)
                state[f"{key}_scale"] = like(scales, parameter, (*parameter.shape[:-1], blocks))
            else:
                narrow = self.kind == "bfloat16" and parameter.dim() >= 2
                zeros = torch.zeros_like(part, dtype=torch.bfloat16 if narrow else torch.float32)
                state[key] = like(zeros, parameter, parameter.shape)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self.fresh_state(parameter)
                self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        weights, gradient = local(parameter), local(parameter.grad)
        generator = torch.Generator(weights.device).manual_seed(
            (self.seed * 1_000_003 + step) * 1_000_003 + self.seeds[parameter] & (1 << 63) - 1
        )
        parts = {key: local(tensor) for key, tensor in state.items() if key != "step"}
        rows = max(1, CHUNK // max(1, weights[:1].numel())) if weights.dim() >= 2 else max(1, weights.numel())
        for start in range(0, weights.shape[0], rows):
            piece = {key: tensor[start : start + rows] for key, tensor in parts.items()}
            self._update_rows(
                weights[start : start + rows], gradient[start : start + rows], piece, group, step, generator
            )

    def _update_rows(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        step: int,
        generator: torch.Generator,
    ) -> None:
        beta1, beta2 = group["betas"]
        g = gradient.float()
        m = _read(state, "exp_avg").lerp_(g, 1 - beta1)
        v = _read(state, "exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
        _store(state, "exp_avg", m, generator)
        _store(state, "exp_avg_sq", v, generator)
        new = weights.float() if weights.dtype != torch.float32 else weights
        new.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        new.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
        if new is not weights:
            weights.copy_(rounded(new, generator))


def hash_of(name: str) -> int:
    """A number that depends on the name alone, in every process."""
    value = 0
    for byte in name.encode():
        value = (value * 1_000_003 + byte) % (1 << 61)
    return value


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probabilities that keep the expected value."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = x.contiguous().view(torch.int32) + noise
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


def encode(x: Tensor, generator: torch.Generator, signed: bool) -> tuple[Tensor, Tensor]:
    """8-bit codes of float32 rows (…, n), and their scales (…, blocks): the largest magnitude of each block.

    Code 0 is zero, code k of `top` (127 with a sign, 255 without) is scale · 2^(-(top - k)·OCTAVES). Between two codes
    the choice is random with the expected value kept; below the lowest, x may become zero if signed, and never
    otherwise: a second moment of zero would make its weight's next step huge.
    """
    top = 127 if signed else 255
    blocks = _blocks(x)
    scales = blocks.abs().amax(-1)
    share = blocks.abs() / scales.clamp_min(1e-38)[..., None]
    place = (top + share.log2() / OCTAVES).clamp_(0, top).floor_()  # the code below, 0 for "under the lowest"
    low = ((place - top) * OCTAVES).exp2_().mul_(place > 0)
    high = ((place + 1 - top) * OCTAVES).exp2_()
    up = torch.rand(share.shape, generator=generator, device=x.device) * (high - low) < share - low
    codes = (place + up).clamp_(max=top)
    if signed:
        codes = (codes * blocks.sign()).to(torch.int8)
    else:
        codes = torch.where(blocks > 0, codes.clamp_(min=1), 0).to(torch.uint8)
    return codes.flatten(-2)[..., : x.shape[-1]], scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 rows that `encode` coded."""
    top = 127 if codes.dtype == torch.int8 else 255
    places = _blocks(codes.float())
    values = ((places.abs() - top) * OCTAVES).exp2_() * places.sign() * scales[..., None]
    return values.flatten(-2)[..., : codes.shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    short = -x.shape[-1] % BLOCK
    return torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, BLOCK))


def _read(state: dict[str, Tensor], key: str) -> Tensor:
    """A float32 moment to compute on: a copy, or the state itself where that is float32 already."""
    if (scales := state.get(f"{key}_scale")) is not None:
        return decode(state[key], scales)
    return state[key].float()


def _store(state: dict[str, Tensor], key: str, value: Tensor, generator: torch.Generator) -> None:
    if (scales := state.get(f"{key}_scale")) is not None:
        codes, new_scales = encode(value, generator, signed=key == "exp_avg")
        state[key].copy_(codes)
        scales.copy_(new_scales)
    elif state[key].dtype == torch.bfloat16:
        state[key].copy_(rounded(value, generator))
    elif state[key] is not value:
        state[key].copy_(value)
