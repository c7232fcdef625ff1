"""A sentence's result does not depend on its batch: 200 sentences by the demo's models, alone, in batches, in another
order, with speculation; under `invariant` to the bit, without it but for ties.

    pytest -m slow -s tests/decode/engine/test_invariance.py

Random models are in test_engine.py and test_speculative.py, several processes in pipeline/test_distributed.py.
"""

import random

import pytest
import torch

from corpora import sample
from decode import Ensemble, translate
from decode.demo import FOLDER
from decode.engine.expression import parse
from decode.pipeline.members import open_members
from minillama import Llama

COUNT = 200
SAMPLE = sample().source
NAMES = ("L", "S_src", "S_tgt", "S_mt", "S_base")
EXPRESSIONS = ("L + S_src + S_tgt", "L + S_mt - 0.5*S_base")
# Slots, what is drafted, whether the sentences come in another order.
REFERENCE = (16, "off", False)
WAYS = [(1, "off", False), (64, "off", False), (16, "off", True), (16, 3, False), (4, "auto", False), (64, 7, True)]
ROUNDINGS, ABSOLUTE = 16, 1e-5  # of a tie


def sentences():
    return [*SAMPLE, *(f"{first}{second}" for first in SAMPLE for second in SAMPLE[20:40])][:COUNT]


def decoded(ensemble, prompts, way):
    """(tokens, log-probabilities) of every sentence, in the order of the prompts."""
    batch_size, speculate, shuffled = way
    order = list(range(COUNT))
    if shuffled:
        random.Random(5).shuffle(order)
    given = {name: [prompts[name][index] for index in order] for name in ensemble.names}
    result = translate(ensemble, given, 64, batch_size, speculate=speculate)
    found = dict(zip(order, zip(result.tokens, result.logprobs)))
    return [found[index] for index in range(COUNT)]


@torch.no_grad()
def is_tie(models, weights, stops, prompts, one, other):
    """Whether the margin where two translations first differ is within float32 rounding, in float64."""
    at = next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
    parts = [
        weight * models[name](torch.tensor([[*prompts[name], *one[:at]]]))[0, -1] for name, weight in weights.items()
    ]
    x_V = torch.stack(parts).sum(0)
    first, second = (x_V[tokens[at]] if at < len(tokens) else x_V[stops].max() for tokens in (one, other))
    magnitude = torch.stack(parts).abs().sum(0).max()
    return abs(first - second) <= ABSOLUTE + ROUNDINGS * 2.0**-23 * magnitude


@pytest.mark.slow
@pytest.mark.parametrize("combine", EXPRESSIONS)
def test_every_way_of_decoding_gives_a_sentence_its_own_result(combine):
    weights = parse(combine, NAMES, all_used=False)
    members = open_members({name: str(FOLDER / name) for name in weights}, None, None)
    lines = sentences()
    prompts = {name: [member.encode(line, "ja", "en") for line in lines] for name, member in zip(weights, members)}
    models = {name: Llama.from_pretrained(FOLDER / name, torch.float32) for name in weights}
    double = {name: Llama.from_pretrained(FOLDER / name, torch.float64) for name in weights}
    invariant = Ensemble(models, weights, invariant=True)
    reference = decoded(invariant, prompts, REFERENCE)
    for way in WAYS:
        assert decoded(invariant, prompts, way) == reference, way
    free = Ensemble(models, weights, invariant=False)
    for way in [REFERENCE, *WAYS]:
        found = decoded(free, prompts, way)
        for index, ((tokens, logprobs), (own_tokens, own_logprobs)) in enumerate(zip(reference, found)):
            if own_tokens == tokens:
                assert own_logprobs == pytest.approx(logprobs, abs=1e-4)
            else:
                own = {name: prompts[name][index] for name in weights}
                assert is_tie(double, weights, sorted(free.stop_tokens), own, tokens, own_tokens), (way, index)
