"""AdamW with bfloat16 states, and the optimizer in backward, against torch's own AdamW."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import examples_of
from tiny import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from minillama import InputError
from minillama.errors import Interrupted
from train import optim
from train.config import Settings
from train.distributed import DistributedContext
from train.metrics import Reporter
from train.optim import GROUP_SIZE, TEMPORARY_BYTES, Optimizer, StochasticAdamW, store_rounded
from train.trainer import Trainer

STATE_IN_BFLOAT16 = Settings(optimizer_state="bfloat16")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def steps(optimizer, parameters, count=20):
    for step in range(count):
        for number, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator(100 * step + number))
            parameter.grad = (parameter.detach() * 0.3 + 0.1 * noise).to(parameter.dtype)
        optimizer.step()


def pair_of_parameters():
    start = [torch.randn(24, 200, generator=generator(1)), torch.randn(40, generator=generator(2))]
    return [[torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2)]


def stochastic(parameters, kind):
    seeds = {parameter: number for number, parameter in enumerate(parameters)}
    given = Settings(lr=1e-2, beta2=0.99, optimizer_state=kind)
    return StochasticAdamW([{"params": parameters, "weight_decay": 0.1}], given, seeds)


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_a_bfloat16_state_makes_the_steps_of_torchs_adamw(kind, tolerance):
    ours, theirs = pair_of_parameters()
    start = [parameter.detach().clone() for parameter in ours]
    steps(stochastic(ours, kind), ours)
    steps(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), theirs)
    for one, other, before in zip(ours, theirs, start):
        moved = (other - before).norm()
        assert (one - other).norm() < tolerance * moved


def test_states_are_bfloat16_for_matrices_and_float32_for_vectors():
    for parameter, dtype in (
        (torch.nn.Parameter(torch.zeros(8, 4)), torch.bfloat16),
        (torch.nn.Parameter(torch.zeros(8)), torch.float32),
    ):
        state = optim.fresh_state(parameter, STATE_IN_BFLOAT16)
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {dtype}


class Costs(TorchDispatchMode):
    """Counts the operations that compute, and the bytes of all tensors they made that are alive at once."""

    def __init__(self):
        super().__init__()
        self.launches, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in (result,) if isinstance(result, torch.Tensor) else ():
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.launches += not func.is_view
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_takes_few_operations_a_group_and_bounded_temporary_memory(monkeypatch, dtype):
    assert GROUP_SIZE * TEMPORARY_BYTES <= 64 << 20
    monkeypatch.setattr(optim, "GROUP_SIZE", 1 << 12)
    costs = {}
    for groups in (1, 8, 32):
        parameter = torch.nn.Parameter(torch.ones(groups * 64, 64, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        optimizer = stochastic([parameter], "bfloat16")
        optimizer.step()  # makes the state
        with Costs() as costs[groups]:
            optimizer.step()
    per_group = (costs[32].launches - costs[8].launches) / 24
    assert per_group <= 25
    assert costs[1].launches <= per_group + 5
    assert costs[32].peak <= (1 << 12) * TEMPORARY_BYTES + 1024


def test_a_step_does_not_depend_on_the_group_size_without_rounding(monkeypatch):
    one, other = pair_of_parameters()
    steps(stochastic(one, "float32"), one, 3)
    monkeypatch.setattr(optim, "GROUP_SIZE", 1000)
    steps(stochastic(other, "float32"), other, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@given(st.floats(2**-100, 2**100), st.booleans())
@settings(deadline=None)
def test_rounding_to_bfloat16_is_to_a_neighbour_and_right_on_average(value, negative):
    x = torch.full((20_000,), -value if negative else value)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    store_rounded(x, y, generator())
    y = y.float()
    assert len(y.unique()) <= 2
    assert (y - x).abs().max() <= x.abs().max() * 2**-7
    assert float(y.double().mean()) == pytest.approx(float(x[0]), rel=2e-4)


def test_a_second_moment_that_moves_by_a_thousandth_still_moves():
    """Round-to-nearest would stop it: from 1 towards 0 with beta2 = 0.999, after 1000 steps exp(-1) is left."""
    parameter = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = StochasticAdamW([{"params": [parameter], "lr": 0.0}], STATE_IN_BFLOAT16, {parameter: 1})
    optimizer.state[parameter] = optim.fresh_state(parameter, STATE_IN_BFLOAT16)
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(1000):
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean() == pytest.approx(0.999**1000, rel=0.02)


def losses_of(settings, output, stop_at=0):
    class Watch(Reporter):
        def step(self, step, loss, tokens):
            trainer.stop.made = step == stop_at

    trainer = Trainer(tiny_model(2), examples_of(16), [], settings, output)
    trainer.run(True, Watch(silent=True))
    metrics = (output / "metrics.jsonl").read_text()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()], metrics


@pytest.mark.parametrize("state", ["", "bfloat16"])
@pytest.mark.parametrize("micro", [0, 2])
def test_an_optimizer_in_backward_makes_the_same_steps(tmp_path, state, micro):
    common = Settings(epochs=3, lr=1e-2, batch_size=4, micro_batch_size=micro, clip=0.0, optimizer_state=state)
    held, _ = losses_of(common, tmp_path / "held")
    released, _ = losses_of(replace(common, release_gradients=True), tmp_path / "released")
    assert all(torch.equal(one, other) for one, other in zip(held, released))


def test_an_optimizer_in_backward_leaves_no_gradients():
    model = tiny_model(2)
    optimizer = Optimizer(model, Settings(epochs=1, clip=0.0, release_gradients=True), DistributedContext())
    optimizer.prepare(1e-3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(optimizer.norm(0.0)) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_bfloat16_states_resumes_to_the_same_bits(tmp_path, dtype):
    settings = Settings(epochs=3, lr=1e-2, batch_size=4, optimizer_state="bfloat16", dtype=dtype)
    whole = losses_of(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        losses_of(settings, tmp_path / "parts", stop_at=5)
    parts = losses_of(settings, tmp_path / "parts")
    assert parts[1] == whole[1]
    assert all(torch.equal(one, other) for one, other in zip(parts[0], whole[0]))


def test_clipping_with_an_optimizer_in_backward_is_refused():
    with pytest.raises(InputError, match="--release-gradients with --clip 1"):
        Settings(epochs=1, release_gradients=True)
