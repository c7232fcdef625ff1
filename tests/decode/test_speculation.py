"""Speculation and batching change what a step does, never what comes out: the same tokens, the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from decode.draws import Draws
from decode.speculate import CHOICE, ENOUGH, LOOKUP, Speculation, lookup
from minillama import InputError

EXPRESSIONS = ("L + S + A", "L + 0.5*S - 0.5*A", "L")


@pytest.fixture(scope="module")
def models():
    """L, a member that often agrees with it (its first layer), and one that seldom does."""
    large = tiny_model(0)
    shallow = tiny_model(0, num_hidden_layers=1)
    shallow.load_state_dict({n: t for n, t in large.state_dict().items() if ".layers.1." not in n})
    return {"L": large, "S": shallow, "A": tiny_model(5)}


@pytest.fixture(scope="module")
def prompts():
    """Prompts that begin alike, with repetitions for lookup to find."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(2, TINY.vocab_size, (6, 4), generator=generator).tolist()
    picks = [torch.randint(6, (length,), generator=generator).tolist() for length in (1, 3, 5, 2, 8, 4, 1)]
    return [[2, 3, 5, *(token for pick in picked for token in words[pick])] for picked in picks]


@settings(max_examples=25, deadline=None)
@given(
    combine=st.sampled_from(EXPRESSIONS),
    batch_size=st.sampled_from((1, 3, 7)),
    speculate=st.sampled_from(("off", "auto", 1, 3, 7)),
    order=st.permutations(range(7)),
    sampled=st.booleans(),
)
def test_every_way_of_decoding_gives_the_same_bits(models, prompts, combine, batch_size, speculate, order, sampled):
    names = [name for name in models if name in combine]
    ensemble = Ensemble({name: models[name] for name in names}, combine)
    draws = Draws(seed=4, temperature=0.7, top_k=20) if sampled else None
    if sampled:
        order = list(range(7))  # a prompt's index is the key of its draws
    plain = translate(ensemble, prompts, 20, batch_size=7, draws=draws)
    other = translate(ensemble, [prompts[i] for i in order], 20, batch_size, speculate=speculate, draws=draws)
    assert [other.tokens[order.index(i)] for i in range(7)] == plain.tokens
    assert [other.logprobs[order.index(i)] for i in range(7)] == plain.logprobs


def test_drafts_are_kept_and_save_steps(models, prompts):
    ensemble = Ensemble({"L": models["L"], "S": models["S"]}, "L + 0.2*S")
    plain = translate(ensemble, prompts, 60, batch_size=1, ignore_eos=True)
    fast = translate(ensemble, prompts, 60, batch_size=1, ignore_eos=True, speculate=3)
    assert fast.tokens == plain.tokens
    assert fast.counters.kept > 0.3 * fast.counters.drafted > 0
    assert fast.counters.drafters.keys() <= {"lookup", "L", "S"}
    by_drafter = fast.counters.drafters.values()
    assert tuple(map(sum, zip(*by_drafter))) == (fast.counters.drafted, fast.counters.kept)
    assert fast.steps < 0.8 * plain.steps


def test_lookup_copies_what_followed_the_last_occurrence():
    assert lookup([9, 1, 2, 3, 4, 5], [7, 1, 2], 2) == [3, 4]
    assert lookup([1, 2, 8, 1, 2, 9], [1, 2], 3) == [9, 1, 2]
    assert lookup([5, 1, 2, 6, 3, 1, 2, 7], [3, 1, 2], 1) == [7]
    assert lookup([1, 2, 3], [4, 5], 2) == []
    assert lookup([], [1], 2) == []


@pytest.mark.parametrize("mode", ["often", "0", 0, 8, "-1"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(InputError, match="speculate"):
        Speculation(2, mode)


def measured(members, rates, seconds):
    """A policy that has seen enough: agreement by drafter, seconds of one position and of each further one."""
    policy = Speculation(members, "auto")
    for drafter, rate in rates.items():
        policy.tallies[drafter].rate, policy.tallies[drafter].seen = rate, ENOUGH
    for part, (first, further) in seconds.items():
        for size in (1, 2, 4, 8, 16, 32, 64, 128):
            policy.seconds[part, size] = first + further * (size - 1)
    return policy


def test_auto_drafts_where_it_pays_and_only_there():
    free, linear = (1.0, 0.0), (1.0, 1.0)
    cheap_expert = {0: free, 1: (0.1, 0.0), CHOICE: (0.0, 0.0)}
    plan = measured(2, {LOOKUP: 0.1, 0: 0.9, 1: 0.8}, cheap_expert).plan(1)
    assert (plan.drafter, plan.length >= 3) == (1, True)  # the cheap member drafts, though the other agrees more often
    assert measured(2, {LOOKUP: 0.7, 0: 0.3, 1: 0.3}, {0: free, 1: free, CHOICE: free}).plan(1).drafter == LOOKUP
    assert measured(2, {LOOKUP: 0.2, 0: 0.9, 1: 0.8}, {0: linear, 1: linear, CHOICE: free}).plan(16) is None
    assert measured(2, {LOOKUP: 0.0, 0: 0.0, 1: 0.0}, cheap_expert).plan(1) is None
    assert Speculation(2, "auto").plan(1) is None  # nothing is known yet


def test_a_fixed_number_is_drafted_by_whom_it_costs_least():
    """The large member agrees more often with what it dominates, and is the last that should draft."""
    policy = measured(2, {LOOKUP: 0.1, 0: 0.9, 1: 0.8}, {})
    policy.mode, policy.weights = 3, [10.0, 1.0]
    assert (policy.plan(1).drafter, policy.plan(1).length) == (1, 3)
    policy.tallies[LOOKUP].rate = 0.9
    assert policy.plan(1).drafter == LOOKUP
