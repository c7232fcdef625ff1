"""Sampling against the exact distribution, from transformers' logits in float64, with and without speculation."""

import pytest
import torch
from tiny import tiny_model

from corpora import sample
from decode import Ensemble, translate
from decode.collab import main
from decode.draws import Draws
from minillama.errors import exit_code

WEIGHTS = {"L": 1.0, "S": 0.6, "A": -0.4}
VOCABULARY = 12
STOP = 1
COPIES = 4000
NEW_TOKENS = 3
PAIRS = sample()


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed, vocab_size=VOCABULARY) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def references(models, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    loaded = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        loaded[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return loaded


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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.4, 5, 1.0), (0.7, 0, 0.9), (2.0, 8, 0.8)]
)
def test_draws_have_the_combined_distribution_with_and_without_speculation(
    models, references, temperature, top_k, top_p
):
    """4,000 draws of up to three tokens under a combination with a negative weight: p above 0.001 for each.

    Every prompt's draws hang on its number, so this is one experiment, the same at every run.
    """
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {name: [PROMPT[name]] * COPIES for name in WEIGHTS}
    expected = exact(references, temperature, top_k, top_p)
    draws = Draws(1234, temperature, top_k, top_p)
    plain = translate(ensemble, prompts, NEW_TOKENS, batch_size=256, draws=draws)
    counts: dict[tuple[int, ...], int] = {}
    for tokens, finished in zip(plain.tokens, plain.finished):
        text = (*tokens, STOP) if finished == "stop" else tuple(tokens)
        counts[text] = counts.get(text, 0) + 1
    assert chi_square(counts, expected) > 1e-3
    drafted = translate(ensemble, prompts, NEW_TOKENS, batch_size=256, draws=draws, speculate=2)
    assert drafted.counters.kept > 100
    assert (drafted.tokens, drafted.logprobs) == (plain.tokens, plain.logprobs)


def test_speculation_with_other_seeds_has_the_combined_distribution_too(models, references):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = {name: [PROMPT[name]] * COPIES for name in WEIGHTS}
    expected = exact(references, 1.0, 0, 1.0)
    values = []
    for seed in (1, 2):
        found = translate(ensemble, prompts, NEW_TOKENS, batch_size=256, draws=Draws(seed), speculate=1)
        counts: dict[tuple[int, ...], int] = {}
        for tokens, finished in zip(found.tokens, found.finished):
            text = (*tokens, STOP) if finished == "stop" else tuple(tokens)
            counts[text] = counts.get(text, 0) + 1
        values.append(chi_square(counts, expected))
    assert min(values) > 1e-3
    assert values[0] != values[1]


def test_a_sentences_draws_are_the_same_in_any_batch_and_hang_on_its_key(models):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = [[5, 7, token] for token in range(2, 12)]
    whole = translate(ensemble, prompts, 8, batch_size=10, draws=Draws(3))
    for batch_size, speculate in ((1, "off"), (3, 2), (4, "auto")):
        found = translate(ensemble, prompts, 8, batch_size, draws=Draws(3), speculate=speculate)
        assert (found.tokens, found.logprobs) == (whole.tokens, whole.logprobs)
    part = translate(ensemble, prompts[6:3:-1], 8, draws=Draws(3, keys=(6, 5, 4)))
    assert part.tokens == whole.tokens[6:3:-1]
    assert translate(ensemble, prompts, 8, draws=Draws(4)).tokens != whole.tokens


