"""Speculation changes what a step computes, never its result: the same tokens, the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_prompts, tiny_model

from decode import Ensemble, translate
from decode.engine import speculative
from decode.engine.engine import Engine
from decode.engine.model_runner import ModelRunner
from decode.engine.sequence import SamplingParams, Sequence
from decode.engine.speculative import Acceptance, NGramIndex, Speculation, expected_tokens
from minillama import InputError

EXPRESSIONS = ("L + S + A", "L + 0.5*S - 0.5*A", "L")
SAMPLED = SamplingParams(0.7, 20, seed=4)


@pytest.fixture(scope="module")
def models():
    """L, a member that often agrees with it (its first layer), and one that seldom does."""
    large = tiny_model(0)
    shallow = tiny_model(0, num_hidden_layers=1)
    shallow.load_state_dict({n: t for n, t in large.state_dict().items() if ".layers.1." not in n})
    return {"L": large, "S": shallow, "A": tiny_model(5)}


@pytest.fixture(scope="module")
def ensembles(models):
    return {text: Ensemble({n: models[n] for n in models if n in text}, text) for text in (*EXPRESSIONS, "L + 0.2*S")}


@pytest.fixture(scope="module")
def pair(ensembles):
    """Two members that often agree."""
    return ensembles["L + 0.2*S"]


@pytest.fixture(scope="module")
def prompts():
    """Prompts that begin alike, with repetitions for prompt lookup."""
    words, generator = random_prompts(2, 6, 4, 4), torch.Generator().manual_seed(2)
    picks = [torch.randint(6, (length,), generator=generator).tolist() for length in (1, 3, 5, 2, 8, 4, 1)]
    return [[2, 3, 5, *(token for pick in picked for token in words[pick])] for picked in picks]


@pytest.fixture(scope="module")
def plain(ensembles, prompts):
    """Results without drafts."""
    combinations = [(combine, params) for combine in EXPRESSIONS for params in (SamplingParams(), SAMPLED)]
    return {key: translate(ensembles[key[0]], prompts, 16, batch_size=7, params=key[1]) for key in combinations}


def draft_anyway(patch):
    """`auto` drafts even where it does not pay, as with these models, whose distributions are flat."""
    patch.setattr("decode.engine.speculative.MIN_SPEEDUP", 0.0)
    patch.setattr("decode.engine.speculative.MIN_CONFIDENCE", 0.05)


@settings(max_examples=8)
@given(
    combine=st.sampled_from(EXPRESSIONS),
    batch_size=st.sampled_from((1, 2, 4, 7)),
    speculate=st.sampled_from(("auto", 1, 3, 7)),
    params=st.sampled_from((SamplingParams(), SAMPLED)),
)
def test_every_way_of_drafting_gives_the_same_bits(ensembles, prompts, plain, combine, batch_size, speculate, params):
    expected = plain[combine, params]
    with pytest.MonkeyPatch.context() as patch:
        draft_anyway(patch)
        found = translate(ensembles[combine], prompts, 16, batch_size, speculate=speculate, params=params)
    assert (found.tokens, found.logprobs, found.finished) == (expected.tokens, expected.logprobs, expected.finished)


def test_drafts_are_accepted_and_save_steps(pair, prompts):
    plain = translate(pair, prompts[:3], 50, batch_size=1, ignore_eos=True)
    fast = translate(pair, prompts[:3], 50, batch_size=1, ignore_eos=True, speculate=3)
    assert fast.tokens == plain.tokens
    assert fast.stats.accepted > 0.3 * fast.stats.drafted > 0
    assert fast.stats.proposers.keys() <= {speculative.LOOKUP, "L", "S"}
    assert tuple(map(sum, zip(*fast.stats.proposers.values()))) == (fast.stats.drafted, fast.stats.accepted)
    assert fast.stats.steps < 0.8 * plain.stats.steps


@pytest.mark.parametrize("speculate", ["auto", 3])
def test_beside_weights_beams_and_targets_nothing_is_drafted_and_nothing_changes(pair, prompts, speculate):
    """Sequences of these kinds make a step plain; the others draft before and after."""

    def sequences():
        made = [Sequence((prompt, prompt), max_new_tokens=30, stop_tokens=frozenset()) for prompt in prompts[:3]]
        prompt = prompts[3], prompts[4]
        return [
            *made,
            Sequence(prompt, max_new_tokens=9, weights=(1.0, -0.5), params=SamplingParams(0.9)),
            Sequence(prompt, max_new_tokens=5, params=SamplingParams(beams=2)),
            Sequence(prompt, targets=[5, 6, 7, 8]),
        ]

    plain = dict(Engine(pair, 4, 90).generate(sequences()))
    engine = Engine(pair, 4, 90, speculate=speculate)
    assert dict(engine.generate(sequences())) == plain
    if speculate == 3:
        assert engine.stats.accepted > 0
        engine = Engine(pair, 4, 90, speculate=speculate)
        own = [Sequence((p, p), max_new_tokens=30, weights=(1.0, 0.2), stop_tokens=frozenset()) for p in prompts[:3]]
        assert [c.tokens for _, c in sorted(engine.generate(own))] == [plain[n].tokens for n in range(3)]
        assert engine.stats.drafted == 0


def test_auto_drafts_nothing_for_many_sequences(pair, prompts, monkeypatch):
    draft_anyway(monkeypatch)
    many = [prompts[number % 7] + [9] * number for number in range(speculative.MAX_SEQUENCES + 1)]
    crowded = translate(pair, many, 40, batch_size=speculative.MAX_SEQUENCES + 1, ignore_eos=True, speculate="auto")
    assert crowded.stats.drafted == 0
    few = translate(pair, prompts, 40, batch_size=2, ignore_eos=True, speculate="auto")
    assert few.stats.drafted > 0


@given(
    prompt=st.lists(st.integers(0, 2), max_size=12),
    text=st.lists(st.integers(0, 2), max_size=12),
    steps=st.lists(st.integers(0, 12), max_size=4),
)
def test_lookup_as_the_text_grows_is_a_search_of_the_whole(prompt, text, steps):
    index = NGramIndex(prompt)
    for end in [*sorted(min(step, len(text)) for step in steps), len(text)]:
        everything = [*prompt, *text[:end]]
        expected = []
        for width in (3, 2):
            starts = [i for i in range(len(everything) - width) if everything[i : i + width] == everything[-width:]]
            if starts and end >= width and not expected:
                expected = everything[starts[-1] + width :][:5]
        assert index.next(text[:end], 5) == expected


@pytest.mark.parametrize("mode", ["often", "0", 0, 8, "-1"])
def test_an_unknown_mode_is_refused(pair, mode):
    with pytest.raises(InputError, match="speculate"):
        Engine(pair, 1, 10, speculate=mode)


@given(acceptance=st.floats(0, 0.999), length=st.integers(1, 7))
def test_expected_tokens_are_those_of_the_paper(acceptance, length):
    """Leviathan, Kalman and Matias 2023, equation 1, in closed form."""
    assert expected_tokens(1.0, length) == length + 1
    assert expected_tokens(acceptance, length) == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance))


def test_an_acceptance_rate_is_an_average_that_forgets():
    acceptance = Acceptance()
    assert (acceptance.rate, acceptance.known) == (0, False)
    outcomes = [True, False, True, True] * 10
    for outcome in outcomes:
        acceptance.add(outcome)
    weights = [speculative.DECAY**age for age in reversed(range(len(outcomes)))]
    expected = sum(w for w, outcome in zip(weights, outcomes) if outcome) / sum(weights)
    assert acceptance.rate == pytest.approx(expected)
    assert acceptance.known
    for _ in range(600):
        acceptance.add(False)
    assert acceptance.rate < 0.01


def plan_of(ensemble, rates, sequences=1, matches=0, mode="auto", costs=None):
    """What is planned with these acceptance rates by proposer, None for prompt lookup."""
    policy = Speculation(Engine(ensemble, 1, 10).runner, mode)
    policy.costs = costs or policy.costs
    for proposer, rate in rates.items():
        policy.acceptance[proposer] = Acceptance(rate * speculative.ENOUGH, speculative.ENOUGH)
    policy.matches = {number: [5] for number in range(matches)}
    return policy._plan(sequences)


def test_a_fixed_number_is_drafted_by_the_best_proposer_and_auto_drafts_only_where_it_pays(pair):
    cheap = {0: 0.9, 1: 0.1}
    assert plan_of(pair, {}) == (None, 0)  # nothing is known yet
    member, length = plan_of(pair, {None: 0.1, 0: 0.9, 1: 0.8}, costs=cheap)
    assert (member, length > 1) == (1, True)  # the cheap member drafts, though the other agrees more often
    assert plan_of(pair, {None: 0.1, 0: 0.9, 1: 0.2}, costs=cheap) == (None, 0)
    assert plan_of(pair, {0: 1.0}, costs={0: 1.0}) == (None, 0)  # a draft that costs what it saves
    proposer, length = plan_of(pair, {None: 0.7, 0: 0.1, 1: 0.1}, matches=1, costs=cheap)
    assert (proposer, length > 1) == (None, True)
    assert plan_of(pair, {None: 0.7, 0: 0.1, 1: 0.1}, matches=0, costs=cheap) == (None, 0)  # no match
    assert plan_of(pair, {None: 0.1, 0: 0.9, 1: 0.8}, 1, 1, mode=3, costs=cheap) == (1, 3)
    assert plan_of(pair, {None: 0.9, 0: 0.9, 1: 0.8}, 1, 1, mode=3, costs=cheap) == (None, 3)
    assert plan_of(pair, {None: 0.9, 0: 0.9, 1: 0.8}, 1, 0, mode=3, costs=cheap) == (1, 3)


@given(rate=st.floats(0, 1), cost=st.floats(0.01, 1))
def test_the_length_is_the_one_with_the_largest_speed_up(pair, rate, cost):
    """Theorem 3.8 of the paper, with a cost of each further position."""

    def speed_up(length):
        return sum(rate**n for n in range(length + 1)) / (1 + length * (cost + speculative.POSITION_COST))

    member, length = plan_of(pair, {1: rate}, costs={1: cost})
    best = max(map(speed_up, speculative.LENGTHS))
    if best > speculative.MIN_SPEEDUP:
        assert member == 1
        assert speed_up(length) == pytest.approx(best)
    else:
        assert length == 0


def test_a_draft_has_the_probability_that_was_required(pair, prompts, monkeypatch):
    """A draft is the member's own continuation, as far as that has at least MIN_CONFIDENCE."""
    least = 0.1
    monkeypatch.setattr("decode.engine.speculative.MIN_CONFIDENCE", least)
    monkeypatch.setattr(Speculation, "_plan", lambda self, sequences: (1, 7))
    seen = []
    observe = Speculation.update

    def update(self, inputs, draft, output):
        seen.extend((entry.sequence.prompts[1] + entry.sequence.tokens, entry.draft) for entry in inputs if entry.draft)
        observe(self, inputs, draft, output)

    monkeypatch.setattr(Speculation, "update", update)
    translate(pair, prompts[:3], 30, batch_size=3, ignore_eos=True, speculate="auto")
    assert seen
    alone = Ensemble({"S": pair.models[1]})
    for prefix, draft in seen:
        (own,) = translate(alone, [prefix], len(draft), ignore_eos=True).logprobs
        assert translate(alone, [prefix], len(draft), ignore_eos=True).tokens[0] == draft
        assert sum(own) >= torch.tensor(least).log().item() - 1e-4


def test_what_processes_count_is_agreed_on(pair, prompts, monkeypatch):
    """A member's logits may differ in a last bit from process to process; what they draft must not."""
    monkeypatch.setattr(ModelRunner, "_agree", lambda self, token_R, *others: [torch.zeros_like(token_R), *others])
    watched = []
    monkeypatch.setattr(Speculation, "_plan", lambda self, sequences: (watched.append(self), (None, 0))[1])
    translate(pair, prompts, 20, batch_size=4, ignore_eos=True, speculate=1)
    assert [watched[0].acceptance[member].rate for member in (0, 1)] == [1, 1]
