"""AdamW with a narrow state, and the step taken in backward: against torch's own AdamW."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import examples_of
from tiny import tiny_model

from minillama import InputError
from minillama.errors import Interrupted
from train.config import Settings
from train.distributed import DistributedContext
from train.metrics import Reporter
from train.optim import BLOCK, CompactAdamW, Optimizer, decode, encode, rounded
from train.trainer import Trainer


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


def compact(parameters, kind):
    seeds = {parameter: number for number, parameter in enumerate(parameters)}
    return CompactAdamW([{"params": parameters, "weight_decay": 0.1}], 1e-2, (0.9, 0.99), kind, 0, seeds)


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.08)])
def test_a_narrow_state_makes_the_steps_of_torchs_adamw(kind, tolerance):
    ours, theirs = pair_of_parameters()
    start = [parameter.detach().clone() for parameter in ours]
    steps(compact(ours, kind), ours)
    steps(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), theirs)
    for one, other, before in zip(ours, theirs, start):
        moved = (other - before).norm()
        assert (one - other).norm() < tolerance * moved


@pytest.mark.parametrize(("kind", "bytes_each"), [("bfloat16", 4.0), ("int8", 2 + 2 * 4 / BLOCK)])
def test_a_narrow_state_is_as_small_as_it_says(kind, bytes_each):
    parameter = torch.nn.Parameter(torch.zeros(64, 4 * BLOCK))
    state = compact([parameter], kind).fresh_state(parameter)
    size = sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key != "step")
    assert size == bytes_each * parameter.numel()


@given(st.floats(2**-100, 2**100), st.booleans())
@settings(deadline=None)
def test_rounding_to_bfloat16_is_to_a_neighbour_and_right_on_average(value, negative):
    x = torch.full((20_000,), -value if negative else value)
    y = rounded(x, generator()).float()
    assert len(y.unique()) <= 2
    assert (y - x).abs().max() <= x.abs().max() * 2**-7
    assert float(y.double().mean()) == pytest.approx(float(x[0]), rel=2e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_right_on_average_and_never_make_a_second_moment_zero(signed):
    x = torch.randn(8, 300, generator=generator()).square() * torch.logspace(-6, 0, 300)
    if signed:
        x = x * torch.randn(8, 300, generator=generator(5)).sign()
    x[:, 7] = 0.0
    total = torch.zeros(8, 300, dtype=torch.float64)
    for seed in range(400):
        codes, scales = encode(x, generator(seed), signed)
        assert codes.dtype == (torch.int8 if signed else torch.uint8)
        y = decode(codes, scales)
        assert not y[:, 7].any()
        if not signed:
            assert (y[x > 0] > 0).all()
        total += y.double()
    mean = total / 400
    biggest = torch.nn.functional.pad(x.abs(), (0, 84)).unflatten(1, (3, BLOCK)).amax(-1).repeat_interleave(BLOCK, 1)
    seen = x.abs() > biggest[:, :300] * 2**-15
    assert seen.float().mean() > 0.5
    assert torch.allclose(mean[seen], x.double()[seen], rtol=0.03)


def test_a_second_moment_that_moves_by_a_thousandth_still_moves():
    """What rounding to nearest loses: from 1 towards 0 with beta2 = 0.999, after 1000 steps exp(-1) is left."""
    parameter = torch.nn.Parameter(torch.ones(64, BLOCK))
    optimizer = CompactAdamW([{"params": [parameter]}], 0.0, (0.9, 0.999), "bfloat16", 0, {parameter: 1})
    optimizer.state[parameter] = optimizer.fresh_state(parameter)
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(1000):
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean() == pytest.approx(0.999**1000, rel=0.02)


def losses_of(chosen, output, stop_at=0):
    class Watch(Reporter):
        def step(self, step, loss, tokens, targets):
            trainer.stop.made = step == stop_at

    trainer = Trainer(tiny_model(2), examples_of(16), [], chosen, output)
    trainer.run(True, Watch(silent=True))
    return [parameter.detach().clone() for parameter in trainer.model.parameters()], (
        output / "metrics.jsonl"
    ).read_text()


@pytest.mark.parametrize("state", ["", "int8"])
@pytest.mark.parametrize("micro", [0, 2])
def test_gradients_released_in_backward_take_the_same_steps(tmp_path, state, micro):
    common = {
        "epochs": 3,
        "lr": 1e-2,
        "batch_size": 4,
        "micro_batch_size": micro,
        "clip": 0.0,
        "optimizer_state": state,
    }
    held, _ = losses_of(Settings(**common), tmp_path / "held")
    released, _ = losses_of(Settings(**common, release_gradients=True), tmp_path / "released")
    assert all(torch.equal(one, other) for one, other in zip(held, released))


def test_released_gradients_are_gone_when_backward_ends():
    model = tiny_model(2)
    optimizer = Optimizer(model, Settings(epochs=1, clip=0.0, release_gradients=True), DistributedContext())
    optimizer.prepare(1e-3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(optimizer.norm(0.0)) > 0


@pytest.mark.parametrize("given", [{"optimizer_state": "int8"}, {"optimizer_state": "bfloat16", "dtype": "bfloat16"}])
def test_a_run_with_a_narrow_state_resumes_to_the_same_bits(tmp_path, given):
    chosen = Settings(epochs=3, lr=1e-2, batch_size=4, **given)
    whole = losses_of(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted):
        losses_of(chosen, tmp_path / "parts", stop_at=5)
    parts = losses_of(chosen, tmp_path / "parts")
    assert parts[1] == whole[1]
    assert all(torch.equal(one, other) for one, other in zip(parts[0], whole[0]))


def test_clipping_what_is_gone_is_refused():
    with pytest.raises(InputError, match="--release-gradients with --clip 1"):
        Settings(epochs=1, release_gradients=True)


def test_checkpointed_activations_train_alike(tmp_path):
    common = {"epochs": 1, "lr": 1e-2, "batch_size": 4}
    plain, _ = losses_of(Settings(**common), tmp_path / "plain")
    recomputed, _ = losses_of(Settings(**common, checkpoint_activations=True), tmp_path / "recomputed")
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed))
