"""The engine on a GPU against the engine on the CPU: `pytest -m gpu`."""

import pytest
import torch
from tiny import TINY, tiny_model

from decode import Ensemble, translate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("speculate", ["off", 3])
def test_a_gpu_chooses_the_tokens_that_the_cpu_chooses(invariant, speculate):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, TINY.vocab_size, (n,), generator=generator).tolist() for n in (3, 17, 9, 30, 1)]
    expression = "L + 0.5*S - 0.25*A"
    models = {name: tiny_model(seed) for seed, name in enumerate("LSA")}
    expected = translate(Ensemble(models, expression), prompts, 20, batch_size=3)
    ensemble = Ensemble({name: model.cuda() for name, model in models.items()}, expression, invariant=invariant)
    result = translate(ensemble, prompts, 20, batch_size=3, speculate=speculate)
    assert result.tokens == expected.tokens
    for ours, theirs in zip(result.logprobs, expected.logprobs):
        assert ours == pytest.approx(theirs, abs=1e-3)
    if invariant:
        alone = [translate(ensemble, [prompt], 20) for prompt in prompts]
        assert [one.logprobs[0] for one in alone] == result.logprobs
