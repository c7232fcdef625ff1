"""Decoding against transformers: the same tokens as summing three models' logits by hand, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from minillama import InputError

WEIGHTS = {"L": 1.0, "S": 0.5, "A": -0.25}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def references(models, tmp_path_factory):
    """The same models in transformers, in float64."""
    from transformers import AutoModelForCausalLM

    loaded = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        loaded[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return loaded


def prompts_of(seed, count, shortest=1, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [torch.randint(2, TINY.vocab_size, (int(n),), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_hand(references, weights, prompts, new_tokens, stops=()):
    """Greedy decoding without a cache: full prefix through every model at every step. One prompt per member."""
    tokens, logprobs = [], []
    while len(tokens) < new_tokens:
        x = sum(
            weight * references[name](torch.tensor([[*prompts[name], *tokens]])).logits[0, -1]
            for name, weight in weights.items()
        )
        token = int(x.argmax())
        if token in stops:
            break
        tokens.append(token)
        logprobs.append(float(x.log_softmax(-1)[token]))
    return tokens, logprobs


def test_tokens_and_logprobs_are_those_of_transformers_logits_summed(models, references):
    ensemble = Ensemble(models, "L + 0.5*S - 0.25*A")
    prompts = prompts_of(1, 7)
    result = translate(ensemble, prompts, max_new_tokens=12, batch_size=3, ignore_eos=True)
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs):
        expected = by_hand(references, WEIGHTS, dict.fromkeys(WEIGHTS, prompt), 12)
        assert tokens == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-4)


def test_members_read_their_own_prompts_at_their_own_positions(models, references):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {"L": prompts_of(2, 5), "S": prompts_of(3, 5, 10, 30), "A": prompts_of(4, 5, 1, 2)}
    result = translate(ensemble, prompts, max_new_tokens=8, batch_size=4, ignore_eos=True)
    for number, tokens in enumerate(result.tokens):
        row = {name: prompts[name][number] for name in WEIGHTS}
        assert tokens == by_hand(references, WEIGHTS, row, 8)[0]


@pytest.fixture(scope="module")
def alone(models):
    """Each of eight prompts in an engine of its own."""
    return [translate(Ensemble(models, WEIGHTS), [prompt], max_new_tokens=10) for prompt in prompts_of(5, 8)]


@settings(max_examples=8)
@given(batch_size=st.integers(1, 9), order=st.permutations(range(8)))
def test_a_sentence_does_not_depend_on_its_batch(models, alone, batch_size, order):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = prompts_of(5, 8)
    result = translate(ensemble, [prompts[i] for i in order], max_new_tokens=10, batch_size=batch_size)
    for at, index in enumerate(order):
        assert (result.tokens[at], result.logprobs[at]) == (alone[index].tokens[0], alone[index].logprobs[0])


def test_a_stop_token_of_any_member_ends_a_sentence_and_is_not_in_it(models, references):
    prompts = prompts_of(6, 6)
    free = translate(Ensemble(models, WEIGHTS), prompts, max_new_tokens=12, ignore_eos=True)
    stop = free.tokens[0][4]
    stopping = dict(models, S=tiny_model(1, eos_token_id=(1, stop)))
    result = translate(Ensemble(stopping, WEIGHTS), prompts, max_new_tokens=12)
    assert result.finished[0] == "stop"
    for full, tokens, finished in zip(free.tokens, result.tokens, result.finished):
        ends = [full.index(token) for token in (1, stop) if token in full]
        assert tokens == full[: min(ends, default=12)]
        assert finished == ("stop" if ends else "length")


def test_ignore_eos_makes_every_result_as_long_as_the_limit(models):
    result = translate(Ensemble(models, WEIGHTS), prompts_of(7, 5), max_new_tokens=15, ignore_eos=True)
    assert [len(tokens) for tokens in result.tokens] == [15] * 5
    assert [len(logprobs) for logprobs in result.logprobs] == [15] * 5


def test_generation_stops_where_a_members_context_ends(models):
    short = dict(models, S=tiny_model(1, max_position_embeddings=24))
    prompts = [list(range(2, 22)), [5, 6]]
    result = translate(Ensemble(short, WEIGHTS), prompts, max_new_tokens=40, ignore_eos=True)
    assert [len(tokens) for tokens in result.tokens] == [4, 22]


def test_a_member_of_weight_zero_is_dropped(models):
    prompts = prompts_of(8, 3)
    two = Ensemble({"L": models["L"], "S": models["S"]}, "L + S")
    three = Ensemble(models, "L + S + 0*A")
    assert three.names == ("L", "S")
    assert translate(three, prompts, 8).tokens == translate(two, prompts, 8).tokens


def test_no_prompts_give_no_results(models):
    assert translate(Ensemble(models), []).tokens == []


def test_bad_prompts_are_refused_before_any_step(models):
    ensemble = Ensemble(models)
    with pytest.raises(InputError, match="prompt 2 is empty"):
        translate(ensemble, [[5], []])
    with pytest.raises(InputError, match="prompt 1 has 96 tokens"):
        translate(ensemble, [[5] * 96])
    with pytest.raises(InputError, match="no prompts for A"):
        translate(ensemble, {"L": [[5]], "S": [[5]]})
    with pytest.raises(InputError, match="unequal numbers"):
        translate(ensemble, {"L": [[5]], "S": [[5]], "A": []})


def test_vocabularies_of_different_sizes_do_not_form_an_ensemble():
    with pytest.raises(InputError, match="A 400, B 399"):
        Ensemble({"A": tiny_model(0), "B": tiny_model(0, vocab_size=399)})


def test_a_member_with_a_nan_raises_and_is_named(models):
    broken = tiny_model(3)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="S"):
        translate(Ensemble({"L": models["L"], "S": broken}), [[5, 6]])


def test_without_room_for_packed_copies_the_models_own_weights_are_used(models, monkeypatch):
    prompts = prompts_of(9, 5)
    expected = translate(Ensemble(models, WEIGHTS), prompts, 10)
    monkeypatch.setattr("decode.engine.ensemble._fits_memory", lambda model: False)
    plain = Ensemble(models, WEIGHTS)
    assert {model.weight_dtype for model in plain.models} == {"plain"}
    assert plain.models[0].head.weight_OD.data_ptr() == models["L"].output_weight.data_ptr()
    assert translate(plain, prompts, 10).tokens == expected.tokens


def test_a_shared_prefix_changes_nothing(models, references):
    shared = prompts_of(10, 1, 30, 30)[0]
    prompts = [[*shared, *own] for own in prompts_of(11, 5)]
    result = translate(Ensemble(models, WEIGHTS), [*prompts, shared], 6, batch_size=2, ignore_eos=True)
    for prompt, tokens in zip([*prompts, shared], result.tokens):
        assert tokens == by_hand(references, WEIGHTS, dict.fromkeys(WEIGHTS, prompt), 6)[0]


def test_long_prompts_are_read_in_chunks_beside_sequences_that_decode(models, monkeypatch):
    monkeypatch.setattr("decode.engine.scheduler.MAX_PROMPT_POSITIONS", 7)
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {"L": prompts_of(12, 6, 1, 40), "S": prompts_of(13, 6, 20, 40), "A": prompts_of(14, 6, 1, 3)}
    result = translate(ensemble, prompts, 9, batch_size=3, ignore_eos=True)
    monkeypatch.undo()
    whole = translate(ensemble, prompts, 9, batch_size=6, ignore_eos=True)
    assert (result.tokens, result.logprobs) == (whole.tokens, whole.logprobs)
    assert result.stats.steps > whole.stats.steps
