"""The engine: sequences of every kind share its slots, and each gets what an engine of its own would give it."""

import math
import random

import pytest
import torch
from engine_requests import CAPACITY, COMBINE, again, alone, mixed, plain_values, run_to_the_end
from tiny import tiny_model

from decode import Ensemble
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence


@pytest.fixture(scope="module")
def requests():
    return mixed(3, 64)


@pytest.fixture(scope="module")
def expected(ensemble, requests):
    return [plain_values(alone(ensemble, sequence)) for sequence in requests]


def test_sequences_of_every_kind_share_an_engine_to_the_bit(ensemble, requests, expected):
    engine = Engine(ensemble, 9, CAPACITY)
    ids = [engine.add(again(sequence)) for sequence in requests]
    assert len(set(ids)) == len(ids)
    completions, tokens = run_to_the_end(engine)
    reasons = set()
    for number, sequence, values in zip(ids, requests, expected):
        assert plain_values(completions[number]) == values
        reasons.add(completions[number].finish_reason)
        if sequence.targets is None:
            assert tokens[number] == completions[number].tokens
    assert reasons == {"stop", "length"}
    assert engine.runner.slots.free == 9
    assert engine.stats.tokens == sum(len(tokens.get(n, [])) for n, s in zip(ids, requests) if s.targets is None)


@pytest.mark.parametrize("seed", range(2))
def test_cancelled_sequences_change_nothing_for_the_others(ensemble, requests, expected, seed):
    """Half of them at any time: before they start, while they read prompts, while they decode."""
    generator = random.Random(seed)
    engine = Engine(ensemble, 8, CAPACITY)
    ids = [engine.add(again(sequence)) for sequence in requests]
    doomed = {number: generator.randint(0, 40) for number in generator.sample(ids, 32)}
    completions, step = {}, 0
    while engine.has_work:
        for number, at in doomed.items():
            if at == step and number not in completions:
                free = engine.runner.slots.free
                held = requests[ids.index(number)].params.beams if number in engine.scheduler.running else 0
                engine.cancel(number)
                assert engine.runner.slots.free == free + held
        for update in engine.step():
            if update.completion is not None:
                completions[update.id] = update.completion
        step += 1
    assert sorted(completions) == sorted(ids)
    assert engine.runner.slots.free == 8
    cancelled = 0
    for number, values in zip(ids, expected):
        if completions[number].finish_reason == "cancelled":
            assert number in doomed
            cancelled += 1
        else:
            assert plain_values(completions[number]) == values
    assert cancelled > 10


def test_what_was_generated_before_a_cancellation_is_returned(ensemble):
    engine = Engine(ensemble, 1, CAPACITY)
    sequence = Sequence(([5],) * 3, max_new_tokens=9, stop_tokens=frozenset())
    whole = alone(ensemble, sequence)
    number = engine.add(again(sequence))
    waiting = engine.add(again(sequence))
    for _ in range(4):
        engine.step()
    engine.cancel(number)
    engine.cancel(waiting)
    engine.cancel(99)  # unknown: nothing happens
    first, second = (update.completion for update in engine.step())
    assert (first.tokens, first.logprobs, first.finish_reason) == (whole.tokens[:4], whole.logprobs[:4], "cancelled")
    assert (second.tokens, second.finish_reason) == ([], "cancelled")
    assert not engine.has_work


def test_a_cancelled_beam_search_is_cancelled_whatever_it_has_found(ensemble):
    """Even where hypotheses are finished already."""
    stops = frozenset(range(2, 30))
    engine = Engine(ensemble, 4, CAPACITY)
    sequence = Sequence(([5], [6], [7]), SamplingParams(beams=4, nbest=4), 30, stops)
    number = engine.add(sequence)
    while not sequence.search.finished:
        assert not engine.step()
    engine.cancel(number)
    (update,) = engine.step()
    assert update.completion.finish_reason == "cancelled"
    assert engine.runner.slots.free == 4


def broken(token):
    """A model whose logits are NaN once it has read this token."""
    model = tiny_model(3, vocab_size=60, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    return model


def test_a_member_with_nan_ends_only_the_sequences_that_use_it(models):
    ensemble = Ensemble({"L": models["L"], "B": broken(40)}, "L + B")
    prompts = [5, 6], [7, 40]
    kinds = [{}, {"params": SamplingParams(0.8)}, {"params": SamplingParams(beams=2)}, {"targets": [5, 6]}]
    without = [Sequence(prompts, max_new_tokens=8, key=7, weights=(1.0, 0.0), **kind) for kind in kinds]
    healthy = Sequence(([5, 6], [7, 8]), max_new_tokens=8, key=7)
    expected = [plain_values(alone(ensemble, sequence)) for sequence in (*without, healthy)]
    engine = Engine(ensemble, 5, CAPACITY)
    bad = [engine.add(Sequence(prompts, max_new_tokens=8, **kind)) for kind in kinds]
    good = [engine.add(again(sequence)) for sequence in (*without, healthy)]
    completions, _ = run_to_the_end(engine)
    for number in bad:
        assert completions[number].finish_reason == "error"
        assert completions[number].error == "NaN in the logits of B"
    assert [plain_values(completions[number]) for number in good] == expected
    assert engine.runner.slots.free == 5


@pytest.mark.parametrize(("beams", "graphs"), [(1, False), (1, True), (3, False)])
def test_an_error_keeps_its_reason_after_tokens_and_finished_hypotheses(models, beams, graphs):
    """The member fails when a generated token is the one it cannot read."""
    params, prompt = SamplingParams(beams=beams), [5, 6]
    tokens = alone(Ensemble({"L": models["L"]}), Sequence((prompt,), params, 12, frozenset())).tokens
    failing = tiny_model(0, vocab_size=60, tie_word_embeddings=False)
    failing.load_state_dict(models["L"].state_dict() | {"lm_head.weight": models["L"].output_weight}, strict=False)
    with torch.no_grad():
        failing.model.embed_tokens.weight[tokens[3]] = math.nan
    engine = Engine(Ensemble({"L": failing}, graphs=graphs), beams, CAPACITY)
    engine.add(Sequence((prompt,), params, 12, frozenset(range(2, 30)) if beams > 1 else frozenset()))
    (completion,) = run_to_the_end(engine)[0].values()
    if beams == 1:
        assert completion.tokens == tokens[: tokens.index(tokens[3]) + 1]
        assert completion.finish_reason == "error"
    assert (completion.finish_reason == "error") == (completion.error == "NaN in the logits of L")
    assert engine.runner.slots.free == beams


def test_generate_raises_with_the_number_of_the_prompt(models):
    ensemble = Ensemble({"L": models["L"], "B": broken(40)}, "L + B")
    engine = Engine(ensemble, 2, CAPACITY)
    with pytest.raises(FloatingPointError, match="prompt 2: NaN in the logits of B"):
        dict(engine.generate([Sequence(([5], [5, 6]), max_new_tokens=2), Sequence(([5], [5, 40]), max_new_tokens=2)]))


def test_caches_of_members_that_are_left_out_are_not_read(ensemble):
    """They hold NaN, which any reader would show; with a graph's function too."""
    for graphs in (False, True):
        models = dict(zip(ensemble.names, ensemble.models))
        engine = Engine(Ensemble(models, COMBINE, graphs=graphs), 3, CAPACITY)
        for cache in engine.runner.slots.caches[1:]:
            cache.entries_LBSEKC.fill_(math.nan)
        weights = (1.0, 0.0, 0.0)
        kinds = [{}, {"params": SamplingParams(0.8)}, {"targets": [5, 6]}, {"params": SamplingParams(beams=3)}]
        sequences = [Sequence(([5, 6], [], []), max_new_tokens=8, key=3, weights=weights, **kind) for kind in kinds]
        only = Ensemble({"L": models["L"]})
        found = dict(engine.generate(sequences))
        for number, kind in enumerate(kinds):
            own = Sequence(([5, 6],), max_new_tokens=8, key=3, stop_tokens=ensemble.stop_tokens, **kind)
            expected = alone(only, own)
            assert (found[number].tokens, found[number].logprobs) == (expected.tokens, expected.logprobs)
            assert found[number].finish_reason == expected.finish_reason


def test_a_model_that_is_a_member_twice_is_held_once(models):
    ensemble = Ensemble({"L": models["L"], "M": models["L"]}, "0.5*L + 0.5*M")
    assert ensemble.models[0] is ensemble.models[1]
    one = alone(Ensemble({"L": models["L"]}), Sequence(([5, 6],), max_new_tokens=8))
    assert alone(ensemble, Sequence(([5, 6],) * 2, max_new_tokens=8)).tokens == one.tokens


@pytest.mark.parametrize("speculate", ["off", 7])
def test_nan_in_a_slot_does_not_reach_the_next_sequence(models, speculate):
    """Attention multiplies masked values by 0: NaN that stays in a slot would spread."""
    ensemble = Ensemble({"L": models["L"], "B": broken(40)}, "L + B")
    good = Sequence(([5, 6, 7, 8] * 3, [7, 8]), max_new_tokens=30, stop_tokens=frozenset())
    expected = plain_values(alone(ensemble, good))
    assert 40 not in expected["tokens"]
    engine = Engine(ensemble, 2, CAPACITY, speculate=speculate)
    if speculate != "off":  # a draft that ends with the token
        engine.speculation._plan = lambda sequences: (None, 7)
        engine.speculation._look_up = lambda decoding: engine.speculation.matches.update(
            {entry.sequence.id: [5, 6, 40] if entry.sequence.id == bad else [] for entry in decoding}
        )
    ids = [engine.add(again(good))]
    prompts = ([5], [9, 40] * 10) if speculate == "off" else ([5], [9] * 10)
    bad = engine.add(Sequence(prompts, max_new_tokens=20, stop_tokens=frozenset()))
    ids += [engine.add(again(good)) for _ in range(2)]
    completions, _ = run_to_the_end(engine)
    assert completions[bad].finish_reason == "error"
    assert [plain_values(completions[number]) for number in ids] == [expected] * 3
