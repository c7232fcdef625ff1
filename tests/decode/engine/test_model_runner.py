"""Members side by side on the cores of a CPU: no bit depends on it."""

import threading

import pytest
import torch
from tiny import WEIGHT_DTYPES, tiny_model

from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.generate import translate
from decode.engine.model_runner import _MemberThreads

PROMPTS = [[5, 9, 20 + number, 7][: 2 + number % 3] for number in range(7)]


def test_results_come_in_the_members_order_and_threads_are_divided(two_threads):
    """Two members side by side with a thread each, the third alone with both."""
    threads = _MemberThreads(3)
    assert threads.map(lambda member: (member, torch.get_num_threads())) == [(0, 1), (1, 1), (2, 2)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_members_error_is_raised_when_no_member_is_running(two_threads, failing):
    threads, ended = _MemberThreads(3), []
    slow = threading.Event()

    def work(member):
        if member == failing:
            raise FloatingPointError(f"member {member}")
        slow.wait(0.05)
        ended.append(member)

    with pytest.raises(FloatingPointError, match=f"member {failing}"):
        threads.map(work)
    assert sorted(ended) == [member for member in (0, 1) if member != failing]
    assert torch.get_num_threads() == 2


def test_only_large_members_on_several_threads_run_side_by_side(two_threads, monkeypatch):
    models = {name: tiny_model(seed) for seed, name in enumerate("LS")}

    def side_by_side(ensemble):
        return Engine(ensemble, 1, 10).runner.threads is not None

    assert not side_by_side(Ensemble(models))
    monkeypatch.setattr("decode.engine.model_runner.MEMBER_THREAD_BYTES", Ensemble(models).models[0].nbytes)
    assert side_by_side(Ensemble(models))
    assert not side_by_side(Ensemble(models, member_threads=False))
    for others in ({"L": models["L"]}, models | {"T": tiny_model(2, num_hidden_layers=1)}):
        assert not side_by_side(Ensemble(others))
    torch.set_num_threads(1)
    assert not side_by_side(Ensemble(models))


@pytest.mark.parametrize("speculate", ["off", pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "weight_dtype", [WEIGHT_DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in WEIGHT_DTYPES[1:])]
)
def test_no_bit_depends_on_threads(two_threads, monkeypatch, weight_dtype, speculate):
    wide = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 1}
    models = {name: tiny_model(seed, **wide) for seed, name in enumerate("LST")}
    monkeypatch.setattr("decode.engine.model_runner.MEMBER_THREAD_BYTES", 0)
    found = []
    for member_threads, threads in ((True, 2), (False, 2), (False, 1)):
        torch.set_num_threads(threads)
        ensemble = Ensemble(models, "L + 0.5*S - 0.25*T", weight_dtype, member_threads=member_threads)
        done = translate(ensemble, PROMPTS[:3], 3, batch_size=2, speculate=speculate)
        found.append((done.tokens, done.logprobs))
    assert found[0] == found[1] == found[2]
