"""The engine: sequences of every kind share its slots, and each gets what an engine of its own would give it."""

import dataclasses
import math
import random

import pytest
import torch
from tiny import tiny_model

from decode import Ensemble
from decode.engine.engine import Engine
from decode.engine.generate import score
from decode.engine.sequence import SamplingParams, Sequence
from minillama import InputError

COMBINE = "L + 0.5*S - 0.25*A"
CAPACITY = 90
NEW = 10


@pytest.fixture(scope="module")
def models():
    """Members of unequal shapes, which see few tokens: then stop tokens are not rare."""
    return {
        "L": tiny_model(0, vocab_size=60, eos_token_id=(1, 3)),
        "S": tiny_model(1, vocab_size=60, num_hidden_layers=1),
        "A": tiny_model(2, vocab_size=60, hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
    }


@pytest.fixture(scope="module")
def ensemble(models):
    return Ensemble(models, COMBINE)


def random_prompt(generator, longest=24):
    return [generator.randrange(2, 60) for _ in range(generator.randint(1, longest))]


def mixed(seed, count):
    """Sequences of every kind: greedy, sampled, searched and scored, with weights and stop tokens of their own."""
    generator = random.Random(seed)
    sequences = []
    for key in range(count):
        prompts = tuple(random_prompt(generator) for _ in range(3))
        weights = generator.choice((None, None, (1.0, 0.0, 0.0), (0.0, 1.5, -0.5), (0.7, 0.3, 0.1), (1.0, -0.4, 0.0)))
        fields = {"weights": weights, "key": key, "max_new_tokens": generator.randint(1, NEW)}
        fields["stop_tokens"] = generator.choice((None, None, frozenset(), frozenset({5, 7, 9, 30})))
        kind = generator.choice(("greedy", "sampled", "sampled", "truncated", "beams", "targets"))
        if kind in ("sampled", "truncated"):
            truncation = (generator.randint(0, 9), generator.choice((0.8, 0.95))) if kind == "truncated" else (0, 1.0)
            fields["params"] = SamplingParams(generator.uniform(0.3, 1.5), *truncation, generator.randint(-9, 9))
        elif kind == "beams":
            beams = generator.randint(2, 4)
            penalty = generator.choice((0.0, 1.0, 1.3))
            fields["params"] = SamplingParams(beams=beams, length_penalty=penalty, nbest=generator.randint(0, beams))
        elif kind == "targets":
            fields["targets"] = random_prompt(generator, 15)
            fields["keep_hidden"] = generator.random() < 0.2
        if kind in ("greedy", "sampled"):
            fields["top_logprobs"] = generator.choice((0, 0, 2, 5))
        if weights is None and kind != "targets":
            fields["explain"] = generator.random() < 0.3
        sequences.append(Sequence(prompts, **fields))
    return sequences


def again(sequence):
    """The same request, not yet decoded."""
    names = "prompts params max_new_tokens stop_tokens weights key explain top_logprobs targets keep_hidden".split()
    return Sequence(**{name: getattr(sequence, name) for name in names})


def plain_values(completion):
    """A completion that can be compared with ==: without tensors, and None for the NaN of members that are left out."""
    fields = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion)}
    own = [[None if math.isnan(value) else value for value in values] for values in completion.member_logprobs]
    return fields | {"hidden": [hidden_TD.tolist() for hidden_TD in completion.hidden], "member_logprobs": own}


def run_to_the_end(engine):
    """Completions by id, and the tokens that the updates brought."""
    completions, tokens = {}, {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.id, []).extend(update.tokens)
            if update.completion is not None:
                assert update.id not in completions
                completions[update.id] = update.completion
    return completions, tokens


def alone(ensemble, sequence):
    """What the sequence gives in an engine that decodes nothing else."""
    engine = Engine(ensemble, sequence.params.beams, CAPACITY)
    number = engine.add(again(sequence))
    return run_to_the_end(engine)[0][number]


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
    generated = sum(len(c.tokens) for number, c in completions.items() if requests[ids.index(number)].targets is None)
    assert engine.stats.tokens == generated


@pytest.mark.parametrize("seed", range(3))
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


@pytest.mark.parametrize("beams", [1, 3])
def test_an_error_keeps_its_reason_after_tokens_and_finished_hypotheses(models, beams):
    """The member fails when a generated token is the one it cannot read."""
    stops = frozenset(range(2, 30))
    ensemble = Ensemble({"L": models["L"]})
    params = SamplingParams(beams=beams)
    prompt = [5, 6]
    tokens = alone(ensemble, Sequence((prompt,), params, 12, frozenset())).tokens
    failing = tiny_model(0, vocab_size=60, tie_word_embeddings=False)
    failing.load_state_dict(models["L"].state_dict() | {"lm_head.weight": models["L"].output_weight}, strict=False)
    with torch.no_grad():
        failing.model.embed_tokens.weight[tokens[3]] = math.nan
    engine = Engine(Ensemble({"L": failing}), beams, CAPACITY)
    engine.add(Sequence((prompt,), params, 12, stops if beams > 1 else frozenset()))
    (completion,) = run_to_the_end(engine)[0].values()
    if beams == 1:
        at = tokens.index(tokens[3])
        assert completion.tokens == tokens[: at + 1]
        assert completion.finish_reason == "error"
    assert (completion.finish_reason == "error") == (completion.error == "NaN in the logits of L")
    assert engine.runner.slots.free == beams


def test_generate_raises_with_the_number_of_the_prompt(models):
    ensemble = Ensemble({"L": models["L"], "B": broken(40)}, "L + B")
    engine = Engine(ensemble, 2, CAPACITY)
    with pytest.raises(FloatingPointError, match="prompt 2: NaN in the logits of B"):
        dict(engine.generate([Sequence(([5], [5, 6]), max_new_tokens=2), Sequence(([5], [5, 40]), max_new_tokens=2)]))


def test_a_token_that_every_member_masks_is_an_error_not_a_token():
    model = tiny_model(0, vocab_size=60, tie_word_embeddings=False, mlp_bias=True)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = -math.inf
        model.lm_head.weight[:, 0] = model.lm_head.weight[:, 0].abs()
    engine = Engine(Ensemble({"L": model}, weight_dtype="plain"), 1, 20)
    engine.add(Sequence(([5],), max_new_tokens=9))
    (completion,) = run_to_the_end(engine)[0].values()
    assert completion.finish_reason == "error"
    assert completion.tokens == []


def test_what_does_not_fit_is_refused_when_it_is_added_with_its_numbers(ensemble):
    engine = Engine(ensemble, 2, [20, 30, 30])
    prompts = ([5] * 15,) * 3
    for sequence, named in (
        (Sequence(prompts, max_new_tokens=6), "needs 21 positions, a slot has 20"),
        (Sequence(prompts, targets=[5] * 6), "needs 21 positions, a slot has 20"),
        (Sequence(prompts, SamplingParams(beams=3)), "needs 3 slots, one for each beam; there are 2"),
        (Sequence(prompts[:2]), "2 prompts for 3 members"),
        (Sequence(([5], [], [5])), "is empty"),
        (Sequence(prompts, weights=(0.0, 0.0, 0.0)), "every weight is zero"),
        (Sequence(prompts, weights=(1.0, 2.0)), "2 weights for 3 members"),
        (Sequence(prompts, weights=(1.0, math.nan, 0.0)), "S is nan"),
        (Sequence(prompts, weights=(1.0, 1e-50, 0.0)), "S is 1e-50"),
        (Sequence(prompts, max_new_tokens=0), "max_new_tokens 0"),
        (Sequence(([5] * 96,) * 3), "has 96 tokens"),
        (Sequence(([5] * 90,) * 3, targets=[5] * 7), "its 7 tokens do not fit"),
        (Sequence(prompts, top_logprobs=33), "33 candidates"),
        (Sequence(prompts, SamplingParams(beams=2), stop_tokens=frozenset(range(31))), "33 candidates"),
    ):
        with pytest.raises(InputError, match=named):
            engine.add(sequence)
    assert not engine.has_work
    for sequence in (Sequence(prompts, max_new_tokens=5), Sequence(([5], [5] * 25, [5]), max_new_tokens=5)):
        assert engine.fits([sequence])
    # A member that is left out may have a prompt that no slot could hold, or none.
    assert engine.fits([Sequence(([5] * 15, [], [5] * 99), max_new_tokens=5, weights=(1.0, 0.0, 0.0))])
    assert not engine.fits([Sequence(prompts, max_new_tokens=6)])


@pytest.mark.parametrize(("slots", "positions"), [(0, 10), (2, 0), (2, [10, 10, 0])])
def test_an_engine_without_slots_or_positions_is_refused(ensemble, slots, positions):
    with pytest.raises(InputError, match="must be at least 1"):
        Engine(ensemble, slots, positions)


def test_a_beam_search_waits_until_it_has_a_slot_for_each_beam(ensemble):
    engine = Engine(ensemble, 4, CAPACITY)
    free = frozenset()
    short = engine.add(Sequence(([5],) * 3, max_new_tokens=3, stop_tokens=free))
    long = engine.add(Sequence(([6],) * 3, max_new_tokens=8, stop_tokens=free))
    search = engine.add(Sequence(([7],) * 3, SamplingParams(beams=3), 4, free))
    after = engine.add(Sequence(([8],) * 3, max_new_tokens=2, stop_tokens=free))
    ended, step = {}, 0
    while engine.has_work:
        assert (search in engine.scheduler.running) <= (short in ended)
        for update in engine.step():
            if update.completion is not None:
                ended[update.id] = step
        step += 1
    assert ended[short] == 2
    assert ended[search] == 6  # from the step after the short one's last
    assert ended[long] == 7
    assert ended[after] == 8  # the order of the queue is kept: it starts when the search ends


def test_a_long_prompt_is_read_in_chunks_beside_sequences_that_decode(ensemble, monkeypatch):
    monkeypatch.setattr("decode.engine.scheduler.MAX_PROMPT_POSITIONS", 8)
    engine = Engine(ensemble, 3, CAPACITY)
    short = Sequence(([5, 6], [7], [8, 9, 10]), max_new_tokens=20, stop_tokens=frozenset())
    long = Sequence(([9] * 60, [8] * 70, [7] * 3), max_new_tokens=2, stop_tokens=frozenset())
    scored = Sequence(([9] * 20, [5], [7] * 3), targets=[5, 6] * 10)
    expected = [plain_values(alone(ensemble, sequence)) for sequence in (short, long, scored)]
    first, second, third = (engine.add(again(sequence)) for sequence in (short, long, scored))
    lengths, completions = [], {}
    while engine.has_work:
        updates = {update.id: update for update in engine.step()}
        completions |= {number: u.completion for number, u in updates.items() if u.completion is not None}
        if first not in completions:
            assert len(updates[first].tokens) == 1  # it never waits for the long prompt
        lengths += [sum(len(s.remaining[1]) for s in engine.scheduler.running.values())]
    assert all(before - after <= 8 for before, after in zip(lengths, lengths[1:]))
    assert [plain_values(completions[number]) for number in (first, second, third)] == expected


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
            expected = alone(only, Sequence(([5, 6],), max_new_tokens=8, key=3, stop_tokens=ensemble.stop_tokens, **kind))
            assert (found[number].tokens, found[number].logprobs) == (expected.tokens, expected.logprobs)
            assert found[number].finish_reason == expected.finish_reason


def test_weights_of_a_sequence_are_those_of_an_ensemble_with_them(models, ensemble):
    prompts = [5, 6, 7], [8, 9], [10]
    for weights in ((0.25, 2.0, -0.75), (0.0, 1.0, 0.5), (1.0, 0.5, -0.25)):
        used = {name: weight for name, weight in zip(models, weights) if weight}
        other = Ensemble({name: models[name] for name in used}, used)
        theirs = tuple(prompt for prompt, weight in zip(prompts, weights) if weight)
        expected = alone(other, Sequence(theirs, max_new_tokens=12, stop_tokens=frozenset()))
        found = alone(ensemble, Sequence(prompts, max_new_tokens=12, stop_tokens=frozenset(), weights=weights))
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_top_logprobs_are_the_best_of_the_combined_distribution(models, ensemble):
    prompts = [5, 6, 7], [8, 9], [10]
    sequence = Sequence(prompts, max_new_tokens=6, stop_tokens=frozenset(), top_logprobs=4)
    found = alone(ensemble, sequence)
    read = [list(prompt) for prompt in prompts]
    for token, logprob, top in zip(found.tokens, found.logprobs, found.top_logprobs):
        x_V = sum(
            weight * models[name](torch.tensor([prompt]))[0, -1].double()
            for (name, weight), prompt in zip(ensemble.weights.items(), read)
        )
        value_K, token_K = x_V.log_softmax(-1).topk(4)
        assert [entry[0] for entry in top] == token_K.tolist()
        assert [entry[1] for entry in top] == pytest.approx(value_K.tolist(), abs=1e-4)
        assert top[0] == (token, logprob)
        for prompt in read:
            prompt.append(token)


def test_log_probabilities_of_targets_are_those_of_the_text_when_generated(ensemble):
    """To the bit, with the end's after them: the sum over stop tokens."""
    prompts = [5, 6, 7], [8, 9], [10]
    free = alone(ensemble, Sequence(prompts, max_new_tokens=9, stop_tokens=frozenset()))
    found = alone(ensemble, Sequence(prompts, targets=free.tokens))
    assert found.tokens == free.tokens
    assert found.logprobs[:-1] == free.logprobs
    assert found.finish_reason == "stop"
    ends = [
        alone(ensemble, Sequence(prompts, targets=[*free.tokens, stop])).logprobs[-2]
        for stop in sorted(ensemble.stop_tokens)
    ]
    assert found.logprobs[-1] == pytest.approx(torch.tensor(ends).double().logsumexp(0).item(), abs=1e-6)
    assert len(found.member_logprobs) == 3
    assert [len(own) for own in found.member_logprobs] == [10] * 3
    scored = dict(score(ensemble, [prompts, prompts], [free.tokens, free.tokens[:4]], batch_size=2))
    assert scored[0].logprobs == found.logprobs
    assert scored[1].logprobs[:-1] == free.logprobs[:4]


def test_hidden_states_give_the_members_logits(ensemble):
    prompts = [5, 6, 7], [8, 9], [10]
    found = alone(ensemble, Sequence(prompts, targets=[11, 12, 13], keep_hidden=True))
    own = alone(ensemble, Sequence(prompts, targets=[11, 12, 13])).member_logprobs
    assert found.logprobs == []
    for model, hidden_TD, logprobs in zip(ensemble.models, found.hidden, own):
        logprob_TV = (hidden_TD @ model.output_matrix().T).log_softmax(-1)
        of_targets = [logprob_TV[at, token].item() for at, token in enumerate((11, 12, 13))]
        assert of_targets == pytest.approx(logprobs[:3], abs=1e-4)
        assert len(hidden_TD) == 4


def test_the_shared_prefix_is_used_only_where_a_prompt_begins_with_it(ensemble):
    prefix = [[5, 6, 7, 8], [9, 9], []]
    engine = Engine(ensemble, 3, CAPACITY, prefix=prefix)
    prompts = [
        ([5, 6, 7, 8, 10], [9, 9, 4], [3]),
        ([5, 6, 7, 8], [9, 9, 4], [3]),  # the first member's is not longer than the prefix
        ([5, 6, 8, 8, 10], [9], [3]),
        ([4], [9, 9, 5, 5], [9, 9]),
    ]
    sequences = [Sequence(prompt, max_new_tokens=8, stop_tokens=frozenset()) for prompt in prompts]
    expected = [plain_values(alone(ensemble, sequence)) for sequence in sequences]
    found = dict(engine.generate(sequences))
    assert [plain_values(found[number]) for number in range(4)] == expected


def test_an_engine_that_fits_has_slots_for_whole_searches_and_room_for_the_longest(ensemble):
    def fitting(batch_size, *beams):
        sequences = [
            Sequence(([5, 6, 4], [7] * n, [5, 6, 8]), SamplingParams(beams=b), 10 + n) for n, b in enumerate(beams, 1)
        ]
        engine = Engine.fitting(ensemble, sequences, batch_size)
        slots = engine.runner.slots
        assert engine.fits(sequences)
        return slots.count, slots.capacity, slots.prefix

    assert fitting(16, 1, 1, 1) == (3, [16, 16, 16], [[5, 6], [], [5, 6]])
    assert fitting(2, 1, 1, 1)[0] == 2
    assert fitting(1, 1, 4)[0] == 4
    assert fitting(10, 4, 4, 4)[0] == 8
    assert fitting(16, 1)[2] == [[], [], []]
    with pytest.raises(InputError, match="batch_size 0"):
        Engine.fitting(ensemble, [], 0)
    with pytest.raises(InputError, match="prompt 2 has 96 tokens"):
        Engine.fitting(ensemble, [Sequence(([5],) * 3), Sequence(([5] * 96,) * 3)], 4)
    assert Engine.fitting(ensemble, [], 4).runner.slots.count == 1


def test_statistics_count_steps_tokens_and_the_first_tokens_time(ensemble):
    engine = Engine(ensemble, 2, CAPACITY)
    assert engine.stats.first_token_time is None
    engine.add(Sequence(([5],) * 3, max_new_tokens=4, stop_tokens=frozenset()))
    engine.add(Sequence(([6],) * 3, max_new_tokens=2, stop_tokens=frozenset()))
    engine.step()
    first = engine.stats.first_token_time
    assert first is not None
    run_to_the_end(engine)
    assert engine.stats.first_token_time == first
    assert (engine.stats.steps, engine.stats.tokens) == (4, 6)
    assert engine.step() == []
    assert engine.stats.steps == 4


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
