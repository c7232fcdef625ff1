"""Explanations against float64 logits of tiny models, in every way of decoding, and what they must not change."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_prompts, tiny_model

from decode import Ensemble, translate
from decode.engine.attribution import Explanation, explain
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence
from kernels import fused_logits

WEIGHTS = {"L": 1.0, "S": 0.6, "A": -0.4}
COMBINE = "L + 0.6*S - 0.4*A"
# Enough stop tokens for some sentences to end, enough noise in none of the figures.
STOPS = tuple(range(1, 12))
NEAR = 2e-4


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed, eos_token_id=STOPS) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def ensemble(models):
    return Ensemble(models, COMBINE)


@pytest.fixture(scope="module")
def prompts():
    return {name: random_prompts(seed, 6, 3, 20) for seed, name in enumerate(WEIGHTS, 5)}


@pytest.fixture(scope="module")
def doubles(models):
    return {name: copy.deepcopy(model).double() for name, model in models.items()}


@torch.no_grad()
def compare_all(doubles, prompts, sentence, explanations):
    """Every explanation against the float64 logits of each member's own forward pass; returns their tokens."""
    tokens = [explanation.token for explanation in explanations]
    found = []
    for name, model in doubles.items():
        prompt = prompts[name][sentence]
        found.append(model(torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :])
    for explanation, logits_NV in zip(explanations, torch.stack(found, dim=1)):
        compare(explanation, logits_NV, list(WEIGHTS.values()))
    return tokens


def compare(found: Explanation, logits_NV, weights, near=NEAR):
    """Every figure by its definition, in float64; logits closer than `near` may swap ranks."""
    weights_N = torch.tensor(weights, dtype=torch.float64)
    logits_NV = logits_NV.double()
    x_V = (weights_N[:, None] * logits_NV).sum(dim=0)
    token = found.token
    others_V = x_V.clone()
    others_V[token] = -torch.inf
    assert others_V[found.runner_up] >= others_V.max() - near
    runner_up = found.runner_up
    logprob_V = x_V.log_softmax(dim=0)
    assert found.logprob == pytest.approx(logprob_V[token].item(), abs=near)
    assert found.runner_up_logprob == pytest.approx(logprob_V[runner_up].item(), abs=near)
    pushes_N = weights_N * (logits_NV[:, token] - logits_NV[:, runner_up])
    assert found.pushes == pytest.approx(pushes_N.tolist(), abs=near)
    assert sum(found.pushes) == pytest.approx(found.margin, abs=5e-6 + 1e-6 * max(map(abs, found.pushes)))
    assert found.margin == pytest.approx((x_V[token] - x_V[runner_up]).item(), abs=near)
    for number, own_V in enumerate(logits_NV):
        assert found.logprobs[number] == pytest.approx(own_V.log_softmax(dim=0)[token].item(), abs=near)
        assert (own_V > own_V[token] + near).sum() < found.ranks[number] <= 1 + (own_V > own_V[token] - near).sum()
        assert own_V[found.bests[number]] >= own_V.max() - near
        assert found.best_logprobs[number] == pytest.approx(own_V.log_softmax(dim=0).max().item(), abs=near)
        assert (found.ranks[number] == 1) == (found.bests[number] == token)


WAYS = {
    "greedy": {},
    "drafted": {"speculate": 3},
    "sampled": {"params": SamplingParams(seed=3, temperature=1.5)},
    "sampled and drafted": {"params": SamplingParams(seed=3, temperature=1.5, top_k=50), "speculate": 2},
}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_figure_is_that_of_float64_logits_and_no_translation_changes(models, doubles, prompts, way, graphs):
    ensemble = Ensemble(models, COMBINE, graphs=graphs)
    plain = translate(ensemble, prompts, 12, batch_size=4, **WAYS[way])
    result = translate(ensemble, prompts, 12, batch_size=4, explain=True, **WAYS[way])
    assert (result.tokens, result.logprobs, result.finished) == (plain.tokens, plain.logprobs, plain.finished)
    assert not any(plain.explanations)
    assert "stop" in result.finished
    for sentence, tokens in enumerate(result.tokens):
        explanations = result.explanations[sentence]
        stopped = result.finished[sentence] == "stop"
        sampled = compare_all(doubles, prompts, sentence, explanations)
        assert sampled[: len(tokens)] == tokens
        assert len(sampled) == len(tokens) + stopped
        assert not stopped or sampled[-1] in STOPS
        assert "sampled" in way or min(explanation.margin for explanation in explanations) >= 0


def test_explanations_do_not_depend_on_the_batch(ensemble, prompts):
    expected = translate(ensemble, prompts, 12, batch_size=4, explain=True).explanations
    for how in ({"batch_size": 1}, {"batch_size": 9}, {"speculate": 3}):
        assert translate(ensemble, prompts, 12, explain=True, **how).explanations == expected
    backwards = {name: own[::-1] for name, own in prompts.items()}
    assert translate(ensemble, backwards, 12, explain=True).explanations == expected[::-1]


def test_every_hypothesis_of_a_beam_search_is_explained(doubles, ensemble, prompts):
    def search(explain):
        params = SamplingParams(beams=3, nbest=3)
        rows = zip(*(prompts[name] for name in WEIGHTS))
        sequences = [Sequence(row, params, max_new_tokens=8, explain=explain) for row in rows]
        found = Engine.fitting(ensemble, sequences, 12).generate(sequences)
        return {index: completion.hypotheses for index, completion in found}

    plain = search(explain=False)
    negative_margins = 0
    for sentence, hypotheses in search(explain=True).items():
        assert [hypothesis.tokens for hypothesis in hypotheses] == [other.tokens for other in plain[sentence]]
        for hypothesis in hypotheses:
            sampled = compare_all(doubles, prompts, sentence, hypothesis.explanations)
            assert sampled[: len(hypothesis.tokens)] == hypothesis.tokens
            assert len(sampled) == len(hypothesis.logprobs)
            negative_margins += sum(explanation.margin < 0 for explanation in hypothesis.explanations)
    assert negative_margins > 0


def explained(logits, weights, tokens=None):
    """Explanations of rows of logits (N, R, V) for these tokens, or for the best ones."""
    logits, weights_N = list(logits), torch.tensor(weights)
    tokens = fused_logits(logits, weights_N).token.tolist() if tokens is None else tokens
    logprobs = fused_logits(logits, weights_N, targets=torch.tensor(tokens)).target_logprob[:, 0].tolist()
    return explain(logits, weights_N, tokens, logprobs)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from([2, 50, 4097, 9001]), st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_any_rows_and_any_token(rows, vocabulary, members, seed, narrow):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if narrow else torch.float32
    logits = (4 * torch.randn(members, rows, vocabulary, generator=generator)).to(dtype)
    weights = (torch.randn(members, generator=generator) + 1.5).tolist()
    tokens = torch.randint(0, vocabulary, (rows,), generator=generator).tolist()
    together = explained(logits, weights, tokens)
    for row, explanation in enumerate(together):
        compare(explanation, logits[:, row], torch.tensor(weights).tolist(), near=1e-4)
        assert explained(logits[:, row : row + 1], weights, tokens[row : row + 1]) == [explanation]


def test_a_masked_token_is_no_runner_up_whatever_the_sign_of_the_weight():
    first = torch.tensor([[5.0, 4.0, 3.0, 1.0], [5.0, -torch.inf, -torch.inf, -torch.inf]])
    second = torch.tensor([[0.0, -torch.inf, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    one, alone = explained((first, second), [1.0, -1.0])
    assert (one.token, one.runner_up, one.pushes) == (0, 2, [2.0, 0.0])
    assert (alone.token, alone.logprob, alone.runner_up, alone.margin, alone.pushes) == (0, 0.0, None, None, [])
    assert alone.decider is None
    assert alone.ranks == [1, 4]


def test_the_deciding_member_and_overruled_members():
    first = torch.tensor([[3.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    second = torch.tensor([[0.0, 0.5, 0.0], [4.0, 0.0, 0.0]])
    third = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    by_first, by_second = explained((first, second, third), [1.0, 1.0, -1.0])
    # Contributions 1.0 and -0.5. The third member, of negative weight, is never overruled.
    assert (by_first.token, by_first.pushes, by_first.decider) == (0, [1.0, -0.5, 0.0], 0)
    assert by_first.overruled([1.0, 1.0, -1.0]) == [1]
    assert (by_second.token, by_second.pushes, by_second.decider) == (0, [-1.0, 4.0, 0.0], 1)
    assert by_second.overruled([1.0, 1.0, -1.0]) == [0]
    assert by_second.ranks == [2, 1, 2]
    assert by_second.bests[0] == 1
    sampled, _ = explained((first, second, third), [1.0, 1.0, -1.0], [1, 0])
    assert (sampled.runner_up, sampled.decider) == (0, None)
    assert sampled.margin == pytest.approx(-0.5, abs=1e-5)
    # Of equal logits the sampled token's is the first.
    (tied,) = explained((torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]])), [1.0, 1.0])
    assert (tied.token, tied.ranks, tied.bests) == (1, [1, 1], [1, 1])


def test_a_member_of_weight_zero_is_left_out_whatever_its_logits_are():
    logits = torch.randn(3, 3, 50, generator=torch.Generator().manual_seed(0))
    weights_NR = torch.tensor([[1.0, 0.5, 1.0], [0.5, 0.0, 0.5], [0.0, -0.5, 1.0]])
    garbage = logits.clone()
    garbage[weights_NR == 0] = torch.nan
    tokens = [3, 4, 5]
    result = fused_logits(list(garbage), weights_NR, targets=torch.tensor(tokens))
    found = explain(list(garbage), weights_NR, tokens, result.target_logprob[:, 0].tolist())
    for row, explanation in enumerate(found):
        used = weights_NR[:, row] != 0
        (alone,) = explained(logits[used, row : row + 1], weights_NR[used, row].tolist(), tokens[row : row + 1])
        assert explanation[:4] == alone[:4]
        for field in ("logprobs", "ranks", "pushes", "bests", "best_logprobs"):
            values, empty = iter(getattr(alone, field)), 0.0 if field == "pushes" else None
            assert getattr(explanation, field) == [next(values) if use else empty for use in used]
        assert explanation.decider is None or used[explanation.decider]
        assert all(used[member] for member in explanation.overruled([1.0] * 3))
