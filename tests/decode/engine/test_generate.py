"""Decoding against transformers: the same tokens as summing three models' logits by hand, whatever the batch."""

import pytest
import torch
from tiny import in_transformers, random_prompts, tiny_model

from decode import Ensemble, translate
from minillama import InputError

WEIGHTS = {"L": 1.0, "S": 0.5, "A": -0.25}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def references(models, tmp_path_factory):
    """The same models in transformers, in float64."""
    return {name: in_transformers(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


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
    prompts = random_prompts(1, 7)
    result = translate(ensemble, prompts, max_new_tokens=12, batch_size=3, ignore_eos=True)
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs):
        expected = by_hand(references, WEIGHTS, dict.fromkeys(WEIGHTS, prompt), 12)
        assert tokens == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-4)
        assert len(tokens) == 12


def test_members_read_their_own_prompts_at_their_own_positions(models, references):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {"L": random_prompts(2, 5), "S": random_prompts(3, 5, 10, 30), "A": random_prompts(4, 5, 1, 2)}
    prompts["L"] = [random_prompts(10, 1, 30, 30)[0] + prompt for prompt in prompts["L"]]  # a shared prefix
    result = translate(ensemble, prompts, max_new_tokens=8, batch_size=4, ignore_eos=True)
    for number, tokens in enumerate(result.tokens):
        row = {name: prompts[name][number] for name in WEIGHTS}
        assert tokens == by_hand(references, WEIGHTS, row, 8)[0]


def test_a_stop_token_of_any_member_ends_a_sentence_and_is_not_in_it(models, references):
    prompts = random_prompts(6, 6)
    free = translate(Ensemble(models, WEIGHTS), prompts, max_new_tokens=12, ignore_eos=True)
    stop = free.tokens[0][4]
    stopping = dict(models, S=tiny_model(1, eos_token_id=(1, stop)))
    result = translate(Ensemble(stopping, WEIGHTS), prompts, max_new_tokens=12)
    assert result.finished[0] == "stop"
    for full, tokens, finished in zip(free.tokens, result.tokens, result.finished):
        ends = [full.index(token) for token in (1, stop) if token in full]
        assert tokens == full[: min(ends, default=12)]
        assert finished == ("stop" if ends else "length")


def test_generation_stops_where_a_members_context_ends(models):
    short = dict(models, S=tiny_model(1, max_position_embeddings=24))
    prompts = [list(range(2, 22)), [5, 6]]
    result = translate(Ensemble(short, WEIGHTS), prompts, max_new_tokens=40, ignore_eos=True)
    assert [len(tokens) for tokens in result.tokens] == [4, 22]


def test_a_member_of_weight_zero_is_dropped(models):
    prompts = random_prompts(8, 3)
    two = Ensemble({"L": models["L"], "S": models["S"]}, "L + S")
    three = Ensemble(models, "L + S + 0*A")
    assert three.names == ("L", "S")
    assert translate(three, prompts, 8).tokens == translate(two, prompts, 8).tokens


def test_bad_prompts_are_refused_before_any_step(models):
    for prompts, message in (
        ([[5], []], "prompt 2 is empty"),
        ([[5] * 96], "prompt 1 has 96 tokens"),
        ({"L": [[5]], "S": [[5]]}, "no prompts for A"),
        ({"L": [[5]], "S": [[5]], "A": []}, "unequal numbers"),
    ):
        with pytest.raises(InputError, match=message):
            translate(Ensemble(models), prompts)
    assert translate(Ensemble(models), []).tokens == []
    with pytest.raises(InputError, match="A 400, B 399"):
        Ensemble({"A": tiny_model(0), "B": tiny_model(0, vocab_size=399)})


def test_without_room_for_packed_copies_the_models_own_weights_are_used(models, monkeypatch):
    prompts = random_prompts(9, 5)
    expected = translate(Ensemble(models, WEIGHTS), prompts, 10)
    monkeypatch.setattr("decode.engine.ensemble._fits_memory", lambda model: False)
    plain = Ensemble(models, WEIGHTS)
    assert {model.weight_dtype for model in plain.models} == {"plain"}
    assert plain.models[0].head.weight_OD.data_ptr() == models["L"].output_weight.data_ptr()
    assert translate(plain, prompts, 10).tokens == expected.tokens
