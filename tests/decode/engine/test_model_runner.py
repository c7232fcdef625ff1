"""Members side by side on the cores of a CPU: who goes where, and that no bit depends on it."""

import threading

import pytest
import torch
from tiny import STORAGES, tiny_model

from decode.engine.ensemble import Ensemble
from decode.lanes import PRODUCTS, WORTH_SECONDS, Lanes, plan
from decode.model.packed_llama import PreparedLlama
from decode.translate import translate

PROMPTS = [[5, 9, 20 + number, 7][: 2 + number % 3] for number in range(7)]
LARGE = 1e9, 1e9


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("costs", "threads", "lanes", "rest"),
    [
        ((1.0, 1.0), 2, ((0,), (1,)), ()),
        ((1.0, 1.0, 1.0), 2, ((0,), (1,)), (2,)),
        ((5.0, 2.0, 2.0), 2, ((0,), (1, 2)), ()),
        ((2.0, 2.0, 5.0), 2, ((2,), (0, 1)), ()),
        ((1.0, 1.0, 1.0), 3, ((0,), (1,), (2,)), ()),
    ],
)
def test_the_largest_go_first_and_one_too_many_comes_afterwards(costs, threads, lanes, rest):
    found = plan(costs, threads)
    assert (found.lanes, found.rest) == (lanes, rest)


@pytest.mark.parametrize(("costs", "threads"), [((1.0,), 8), ((1.0, 1.0), 1), ((100.0, 1.0), 2)])
def test_members_stay_one_after_another_where_lanes_bring_nothing(costs, threads):
    assert plan(costs, threads) is None


def test_every_member_is_in_one_place_and_all_threads_have_work():
    for threads in (2, 3, 4, 16):
        for costs in ((3.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0, 5.0), (1.0,) * 8):
            found = plan(costs, threads)
            assert sorted([*found.rest, *(member for lane in found.lanes for member in lane)]) == [*range(len(costs))]
            assert found.threads * len(found.lanes) <= threads


def test_results_come_in_the_members_order_and_threads_are_divided(two_threads):
    lanes = Lanes([1.0, 1.0, 1.0], [LARGE] * 3)
    assert lanes.run(lambda member: (member, torch.get_num_threads())) == [(0, 1), (1, 1), (2, 2)]
    assert torch.get_num_threads() == 2


def test_small_products_are_worth_lanes_only_with_many_rows():
    models = [PreparedLlama(tiny_model(seed, hidden_size=64)) for seed in range(2)]
    ensemble = Ensemble(dict(zip("AB", models)))
    torch.set_num_threads(2)
    try:
        enough = next(rows for rows in range(10**6) if ensemble.lanes(rows) is not None)
    finally:
        torch.set_num_threads(1)
    linears = models[0].layers[0].linears
    average = sum(linear.numbers for linear in linears) / len(linears)
    assert 0 < enough - WORTH_SECONDS * PRODUCTS / average <= 1
    assert Lanes([1.0, 1.0], [LARGE] * 2).least_rows == 0


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_members_error_is_raised_when_nobody_is_at_work(two_threads, failing):
    lanes, ended = Lanes([1.0, 1.0, 1.0], [LARGE] * 3), []
    slow = threading.Event()

    def work(member):
        if member == failing:
            raise FloatingPointError(f"member {member}")
        slow.wait(0.05)
        ended.append(member)

    with pytest.raises(FloatingPointError, match=f"member {failing}"):
        lanes.run(work)
    assert sorted(ended) == [member for member in (0, 1) if member != failing]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("speculate", ["off", "auto", 2])
def test_no_bit_depends_on_lanes_or_threads(two_threads, monkeypatch, storage, speculate):
    wide = {"hidden_size": 192, "intermediate_size": 512}
    models = {name: tiny_model(seed, **wide) for seed, name in enumerate(("L", "S", "T"))}
    monkeypatch.setattr("decode.lanes.WORTH_SECONDS", 0.0)
    found = []
    for lanes, threads in ((True, 2), (False, 2), (False, 1)):
        torch.set_num_threads(threads)
        ensemble = Ensemble(models, "L + 0.5*S - 0.25*T", storage=storage, lanes=lanes)
        assert (ensemble.lanes(9) is not None) == lanes
        done = translate(ensemble, PROMPTS, 12, batch_size=3, speculate=speculate)
        found.append((done.tokens, done.logprobs))
    assert found[0] == found[1] == found[2]
