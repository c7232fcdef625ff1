"""Log-probabilities: of targets, of the best tokens, under weights of a sequence's own."""

import pytest
import torch
from engine_requests import alone

from decode import Ensemble
from decode.engine.generate import score
from decode.engine.sequence import Sequence

PROMPTS = [5, 6, 7], [8, 9], [10]


def test_weights_of_a_sequence_are_those_of_an_ensemble_with_them(models, ensemble):
    for weights in ((0.25, 2.0, -0.75), (0.0, 1.0, 0.5), (1.0, 0.5, -0.25)):
        used = {name: weight for name, weight in zip(models, weights) if weight}
        other = Ensemble({name: models[name] for name in used}, used)
        theirs = tuple(prompt for prompt, weight in zip(PROMPTS, weights) if weight)
        expected = alone(other, Sequence(theirs, max_new_tokens=12, stop_tokens=frozenset()))
        found = alone(ensemble, Sequence(PROMPTS, max_new_tokens=12, stop_tokens=frozenset(), weights=weights))
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_top_logprobs_are_the_best_of_the_combined_distribution(models, ensemble):
    sequence = Sequence(PROMPTS, max_new_tokens=6, stop_tokens=frozenset(), top_logprobs=4)
    found = alone(ensemble, sequence)
    read = [list(prompt) for prompt in PROMPTS]
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
    free = alone(ensemble, Sequence(PROMPTS, max_new_tokens=9, stop_tokens=frozenset()))
    found = alone(ensemble, Sequence(PROMPTS, targets=free.tokens))
    assert found.tokens == free.tokens
    assert found.logprobs[:-1] == free.logprobs
    assert found.finish_reason == "stop"
    ends = [
        alone(ensemble, Sequence(PROMPTS, targets=[*free.tokens, stop])).logprobs[-2]
        for stop in sorted(ensemble.stop_tokens)
    ]
    assert found.logprobs[-1] == pytest.approx(torch.tensor(ends).double().logsumexp(0).item(), abs=1e-6)
    assert len(found.member_logprobs) == 3
    assert [len(own) for own in found.member_logprobs] == [10] * 3
    scored = dict(score(ensemble, [PROMPTS, PROMPTS], [free.tokens, free.tokens[:4]], batch_size=2))
    assert scored[0].logprobs == found.logprobs
    assert scored[1].logprobs[:-1] == free.logprobs[:4]


def test_hidden_states_give_the_members_logits(ensemble):
    found = alone(ensemble, Sequence(PROMPTS, targets=[11, 12, 13], keep_hidden=True))
    own = alone(ensemble, Sequence(PROMPTS, targets=[11, 12, 13])).member_logprobs
    assert found.logprobs == []
    for model, hidden_TD, logprobs in zip(ensemble.models, found.hidden, own):
        logprob_TV = (hidden_TD @ model.output_matrix().T).log_softmax(-1)
        of_targets = [logprob_TV[at, token].item() for at, token in enumerate((11, 12, 13))]
        assert of_targets == pytest.approx(logprobs[:3], abs=1e-4)
        assert len(hidden_TD) == 4
