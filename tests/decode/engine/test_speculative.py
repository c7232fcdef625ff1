"""Speculation and batching change what a step does, never what comes out: the same tokens, the same bits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from decode.draws import Draws
from decode.engine.speculative import CHOICE, ENOUGH, LOOKUP, MOST_DRAFTED, PRIOR, RESTING, Copies, Draft, Speculation, Tally
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


def copied(prompt, text, length):
    return Copies(prompt).next(text, length)


def test_lookup_copies_what_followed_the_last_occurrence():
    assert copied([9, 1, 2, 3, 4, 5], [7, 1, 2], 2) == [3, 4]
    assert copied([1, 2, 8, 1, 2, 9], [1, 2], 3) == [9, 1, 2]
    assert copied([5, 1, 2, 6, 3, 1, 2, 7], [3, 1, 2], 1) == [7]
    assert copied([1, 2, 3], [4, 5], 2) == []
    assert copied([], [1, 2], 2) == []


@given(
    prompt=st.lists(st.integers(0, 2), max_size=12),
    text=st.lists(st.integers(0, 2), max_size=12),
    steps=st.lists(st.integers(0, 12), max_size=4),
)
def test_lookup_as_the_text_grows_is_a_search_of_the_whole(prompt, text, steps):
    copies = Copies(prompt)
    for end in [*sorted(min(step, len(text)) for step in steps), len(text)]:
        everything = [*prompt, *text[:end]]
        expected = []
        for width in (3, 2):
            starts = [i for i in range(len(everything) - width) if everything[i : i + width] == everything[-width:]]
            if starts and end >= width and not expected:
                expected = everything[starts[-1] + width :][:5]
        assert copies.next(text[:end], 5) == expected


@pytest.mark.parametrize("mode", ["often", "0", 0, 8, "-1"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(InputError, match="speculate"):
        Speculation(2, mode)


def agreed(policy, drafter, rate):
    policy.tallies[drafter].agreed, policy.tallies[drafter].seen = rate * ENOUGH, ENOUGH


def measured(members, rates, seconds):
    """A policy that has seen enough: agreement by drafter, seconds of one position and of each further one."""
    policy = Speculation(members, "auto")
    for drafter, rate in rates.items():
        agreed(policy, drafter, rate)
    for part, (first, further) in seconds.items():
        for size in (1, 2, 4, 8, 16, 32, 64, 128):
            policy.seconds[part, size] = first + further * (size - 1)
    return policy


def test_auto_drafts_where_it_pays_and_only_there():
    free, linear = (1.0, 0.0), (1.0, 1.0)
    cheap_expert = {0: free, 1: (0.1, 0.0), CHOICE: (0.0, 0.0)}
    plan = measured(2, {LOOKUP: 0.1, 0: 0.9, 1: 0.8}, cheap_expert).plan(1)
    assert (plan.drafter, plan.length >= 3) == (1, True)  # the cheap member drafts, though the other agrees more often
    copying = measured(2, {LOOKUP: 0.7, 0: 0.3, 1: 0.3}, {0: free, 1: free, CHOICE: free})
    assert copying.plan(1, copying=1).drafter == LOOKUP
    assert copying.plan(1, copying=0) is None  # nothing is there to copy, and nobody else is worth it
    assert copying.plan(20, copying=1) is None  # one row in twenty gains next to nothing
    assert measured(2, {LOOKUP: 0.2, 0: 0.9, 1: 0.8}, {0: linear, 1: linear, CHOICE: free}).plan(16) is None
    assert measured(2, {LOOKUP: 0.0, 0: 0.0, 1: 0.0}, cheap_expert).plan(1) is None
    assert Speculation(2, "auto").plan(1) is None  # nothing is known yet


def test_a_longer_draft_is_tried_only_where_passes_half_as_long_were_measured():
    policy = measured(2, {LOOKUP: 0.0, 0: 0.9, 1: 0.9}, {0: (1.0, 0.0), 1: (0.01, 0.0), CHOICE: (0.0, 0.0)})
    assert policy.plan(1).length == MOST_DRAFTED
    policy.seconds = {key: value for key, value in policy.seconds.items() if key[1] <= 16}
    assert [policy.plan(rows).length for rows in (4, 8, 16)] == [7, 3, 1]


def test_a_draft_ends_before_a_token_that_costs_more_than_it_brings():
    """The drafter takes a quarter of a step: its tokens must be kept more often than that, for what they bring."""
    policy = measured(2, {LOOKUP: 0.0, 0: 0.5, 1: 0.8}, {0: (0.75, 0.0), 1: (0.25, 0.0), CHOICE: (0.0, 0.0)})
    plan = policy.plan(1)
    assert plan.drafter == 1
    assert 0.25 < plan.least < 0.5
    dearer = measured(2, {LOOKUP: 0.0, 0: 0.5, 1: 0.8}, {0: (0.75, 0.1), 1: (0.25, 0.0), CHOICE: (0.0, 0.0)})
    assert dearer.plan(1).least > plan.least  # every position that is checked takes time too


def test_drafts_that_end_early_lose_no_token(models, prompts, monkeypatch):
    """A draft of unequal length in every row, down to none, and the same tokens and bits."""
    ensemble = Ensemble({"L": models["L"], "S": models["S"]}, "L + 0.2*S")
    plain = translate(ensemble, prompts, 40, batch_size=4, ignore_eos=True)
    drafted = {}
    for least in (0.0, 0.5, 1.1):

        def plan(policy, rows, copying, least=least):
            return Draft(1, 5, least) if all(policy.tallies[member].known for member in (0, 1)) else None

        monkeypatch.setattr(Speculation, "plan", plan)
        found = translate(ensemble, prompts, 40, batch_size=4, ignore_eos=True, speculate="auto")
        assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)
        drafted[least] = found.counters.drafted, found.counters.kept / max(1, found.counters.drafted)
    assert drafted[0.0][0] > drafted[0.5][0] > drafted[1.1][0] == 0
    assert drafted[0.5][1] > drafted[0.0][1]  # what is left out is what would not have been kept


def test_what_a_draft_ended_before_is_compared_too(models, prompts, monkeypatch):
    """Else agreement would be that of likely tokens alone, and a policy that drafts nothing would never find out."""
    ensemble = Ensemble({"L": models["L"], "S": models["S"]}, "L + 0.2*S")
    monkeypatch.setattr(Speculation, "rest", lambda policy, rows: None)
    rates = {}
    for least in (0.0, 1.1):
        policies = []

        def plan(policy, rows, copying, least=least, policies=policies):
            policies.append(policy)
            return Draft(1, 1, least) if policy.tallies[1].known else None

        monkeypatch.setattr(Speculation, "plan", plan)
        translate(ensemble, prompts, 40, batch_size=7, ignore_eos=True, speculate="auto")
        tally = policies[0].tallies[1]
        rates[least] = tally.rate
        assert tally.seen > 60
        assert sum(alike.seen for alike in tally.by_sureness) > 60
    assert rates[1.1] == pytest.approx(rates[0.0], abs=0.2)
    assert 0 < rates[1.1] < 1


def test_what_processes_count_is_agreed_on(models, prompts, monkeypatch):
    """A member's logits may differ in a last bit from process to process; what they draft must not."""
    ensemble = Ensemble({"L": models["L"], "S": models["S"]}, "L + 0.2*S")
    monkeypatch.setattr(Ensemble, "agree", lambda self, numbers: [0.0 for _ in numbers])
    watched = []
    monkeypatch.setattr(Speculation, "plan", lambda policy, rows, copying: watched.append(policy))
    translate(ensemble, prompts, 20, batch_size=7, ignore_eos=True, speculate="auto")
    assert [watched[0].tallies[member].rate for member in (0, 1)] == [0, 0]
    assert watched[0].tallies[1].known


def test_how_sure_a_drafter_is_tells_how_likely_its_token_is_kept():
    tally = Tally()
    tally.add(50, 100)
    assert tally.chance(0.9) == tally.chance(0.1) == tally.rate  # nothing is known of either
    for _ in range(40):
        tally.add_sure(True, 0.95)
        tally.add_sure(False, 0.05)
    assert tally.chance(1.0) > 0.9 > 0.1 > tally.chance(0.0)
    for _ in range(PRIOR):
        tally.add_sure(True, 0.3)
    assert tally.chance(0.3) == pytest.approx((1 + tally.rate) / 2, rel=0.05)


def test_a_drafter_that_knows_when_it_is_right_drafts_though_it_is_seldom_right():
    """Half its tokens are worth nothing and it knows which: they are not drafted, and the others pay."""
    times = {0: (1.0, 0.0), 1: (0.4, 0.0), CHOICE: (0.0, 0.0)}
    policy = measured(2, {LOOKUP: 0.0, 0: 0.0, 1: 0.4}, times)
    assert policy.plan(1) is None
    for _ in range(40):
        policy.compared(1, [True], [0.95])
        policy.compared(1, [False], [0.2])
    tally = policy.tallies[1]
    assert tally.sure_from(0) == pytest.approx((1, 0.5), abs=0.05)
    assert tally.sure_from(7) == pytest.approx((0.5, 0.5), abs=0.05)
    plan = policy.plan(1)
    assert plan.drafter == 1
    assert tally.chance(0.2) < plan.least < tally.chance(0.95)


@pytest.mark.parametrize(("rows", "resting"), [(0, 0), (1, 0), (2, 0), (4, 1), (16, RESTING - 1), (64, RESTING - 1)])
def test_many_rows_rest_from_questions_and_few_hardly(rows, resting):
    """What many have to copy and to draft changes slowly; a lone one may have something to copy at once."""
    policy = measured(2, {LOOKUP: 0.1, 0: 0.1, 1: 0.1}, {0: (1.0, 0.0), 1: (1.0, 0.0), CHOICE: (0.1, 0.0)})
    policy.rest(rows)
    unasked = []
    for policy.steps in range(1, 2 * RESTING):
        unasked.append(policy.rests())
        assert policy.copies() == (not policy.rests())
    assert unasked == [at < resting for at in range(len(unasked))]


def test_nobody_rests_before_there_is_an_answer():
    times = {0: (1.0, 0.0), 1: (1.0, 0.0), CHOICE: (0.1, 0.0)}
    for policy in (Speculation(2, "auto"), measured(2, {0: 0.1, 1: 0.1}, {}), measured(2, {0: 0.1}, times)):
        policy.rest(16)
        policy.steps += 1
        assert not policy.rests()
    unread = measured(2, {0: 0.1, 1: 0.1}, times)
    unread.rest(16)
    unread.steps += 1
    assert unread.rests()
    assert unread.copies()  # how good copying is has yet to be seen


@pytest.mark.parametrize("drafter", [None, 1])
def test_rows_that_rest_are_decoded_without_a_question(models, prompts, monkeypatch, drafter):
    """Whether nobody should draft or a draft came to nothing: then only every so many steps ask again."""
    ensemble = Ensemble({"L": models["L"], "S": models["S"]}, "L + 0.2*S")
    plain = translate(ensemble, prompts, 40, batch_size=len(prompts), ignore_eos=True)
    asked = []

    def plan(policy, rows, copying):
        if not all(policy.tallies[member].known for member in policy.drafting_members):
            return None
        asked.append(policy.steps)
        return drafter and Draft(drafter, 1, 1.1)

    monkeypatch.setattr(Speculation, "plan", plan)
    found = translate(ensemble, prompts, 40, batch_size=len(prompts), ignore_eos=True, speculate="auto")
    assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)
    assert len(asked) > 2
    assert {b - a for a, b in pairwise(asked)} == {min(RESTING, len(prompts) // 2)}


def test_a_fixed_number_is_drafted_by_whom_it_costs_least():
    """The large member agrees more often with what it dominates, and is the last that should draft."""
    policy = measured(2, {LOOKUP: 0.1, 0: 0.9, 1: 0.8}, {})
    policy.mode, policy.weights = 3, [10.0, 1.0]
    assert (policy.plan(1, 1).drafter, policy.plan(1, 1).length) == (1, 3)
    agreed(policy, LOOKUP, 0.9)
    assert policy.plan(1, copying=1).drafter == LOOKUP
    assert policy.plan(1, copying=0).drafter == 1
