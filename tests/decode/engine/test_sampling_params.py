"""Sampling against the exact distribution, from transformers' logits in float64, with and without speculation."""

import math
from collections import Counter

import pytest
import torch
from tiny import in_transformers, tiny_model

from decode import Ensemble, translate
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence
from minillama import InputError

WEIGHTS = {"L": 1.0, "S": 0.6, "A": -0.4}
VOCABULARY = 12
STOP = 1
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed, vocab_size=VOCABULARY) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def references(models, tmp_path_factory):
    return {name: in_transformers(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


PROMPT = {"L": [2, 5, 7, 5, 7, 3], "S": [4, 4, 9], "A": [11, 2, 5, 7, 3, 3, 6]}


@torch.no_grad()
def exact(references, temperature, top_k, top_p):
    """The probability of every text of up to three tokens: a dictionary from tokens (with the stop token)."""
    every = {(): 1.0}
    for _ in range(NEW_TOKENS):
        longer = {}
        for tokens, mass in every.items():
            if STOP in tokens:
                longer[tokens] = mass
                continue
            x_V = sum(
                weight * references[name](torch.tensor([[*PROMPT[name], *tokens]])).logits[0, -1]
                for name, weight in WEIGHTS.items()
            )
            p_V = (x_V / temperature).softmax(-1)
            kept_V = torch.ones(VOCABULARY, dtype=torch.bool)
            if top_k:
                kept_V &= p_V >= p_V.sort(descending=True).values[top_k - 1]
            # a token passes top-p when those above it have less mass than that
            above_V = torch.stack([p_V[p_V > p].sum() for p in p_V])
            kept_V &= above_V < top_p
            p_V = torch.where(kept_V, p_V, 0.0)
            p_V /= p_V.sum()
            longer |= {(*tokens, token): mass * float(p) for token, p in enumerate(p_V) if p > 0}
        every = longer
    assert sum(every.values()) == pytest.approx(1.0)
    return every


def chi_square(found, expected):
    """p-value of counts against probabilities; texts expected fewer than five times are one cell."""
    from scipy.stats import chisquare

    count = sum(found.values())
    assert found.keys() <= expected.keys()
    common = [text for text, mass in expected.items() if mass * count >= 5]
    assert len(common) > 10
    observed = [found.get(text, 0) for text in common]
    probable = [expected[text] * count for text in common]
    if (rest := count - sum(probable)) > 1:
        observed.append(count - sum(observed))
        probable.append(rest)
    scale = sum(observed) / sum(probable)
    return chisquare(observed, [value * scale for value in probable]).pvalue


def counts_of(result):
    """How often each text came, with its stop token."""
    ends = [(STOP,) if finished == "stop" else () for finished in result.finished]
    return Counter((*tokens, *end) for tokens, end in zip(result.tokens, ends))


KINDS = [(1.0, 0, 1.0), (1.4, 5, 1.0), (0.7, 0, 0.9), (2.0, 8, 0.8)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "samples"),
    [(2.0, 8, 0.8, 600), *(pytest.param(*kind, 4000, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_samples_have_the_combined_distribution_with_and_without_speculation(
    models, references, temperature, top_k, top_p, samples
):
    """Texts of up to three tokens under a combination with a negative weight: p above 0.001.

    A sample is a function of the seed and the prompt's number, so this is one experiment, the same at every run.
    """
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {name: [PROMPT[name]] * samples for name in WEIGHTS}
    params = SamplingParams(temperature, top_k, top_p, seed=1234)
    plain = translate(ensemble, prompts, NEW_TOKENS, batch_size=256, params=params)
    assert chi_square(counts_of(plain), exact(references, temperature, top_k, top_p)) > 1e-3
    drafted = translate(ensemble, prompts, NEW_TOKENS, batch_size=256, params=params, speculate=2)
    assert drafted.stats.accepted > samples / 40
    assert (drafted.tokens, drafted.logprobs) == (plain.tokens, plain.logprobs)


def test_a_sample_is_the_same_in_any_batch_and_depends_on_its_key(models):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = [[5, 7, token] for token in range(2, 12)]
    params = SamplingParams(1.0, seed=3)
    whole = translate(ensemble, prompts, 8, batch_size=10, params=params)
    for batch_size, speculate in ((1, "off"), (3, 2), (4, "auto")):
        found = translate(ensemble, prompts, 8, batch_size, params=params, speculate=speculate)
        assert (found.tokens, found.logprobs) == (whole.tokens, whole.logprobs)
    part = [Sequence((prompts[key],) * 3, params, 8, key=key) for key in (6, 5, 4)]
    found = dict(Engine.fitting(ensemble, part, 2).generate(part))
    assert [found[number].tokens for number in range(3)] == whole.tokens[6:3:-1]
    assert translate(ensemble, prompts, 8, params=SamplingParams(1.0, seed=4)).tokens != whole.tokens


def test_any_integer_is_a_seed(models):
    ensemble = Ensemble(models, WEIGHTS)
    found = [
        translate(ensemble, [[5, 7]], 12, ignore_eos=True, params=SamplingParams(1.0, seed=seed)).tokens[0]
        for seed in (-1, 2**63 - 1, 2**64 - 1, 2**70 + 5, 5)
    ]
    assert found[2] == found[0] != found[1]
    assert found[3] == found[4]
    same = [Sequence(([5],) * 3, SamplingParams(2.0), 10, frozenset()) for _ in range(4)]  # without keys: their ids
    assert len({tuple(completion.tokens) for _, completion in Engine(ensemble, 4, 20).generate(same)}) == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": 1e-39}, "temperature 1e-39"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2**63}, "top_k 9223372036854775808"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"beams": 0}, "0 beams"),
        ({"beams": 9}, "9 beams"),
        ({"beams": 2, "nbest": 3}, "nbest 3"),
        ({"length_penalty": math.nan}, "length_penalty nan"),
        ({"temperature": 1.0, "beams": 2}, "not both"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        SamplingParams(**fields)
