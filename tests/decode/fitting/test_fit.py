"""The likelihood of texts as a function of the weights, and its fit, against the plain models' logits in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import TINY, WEIGHT_DTYPES, tiny_model

from decode import Ensemble, translate
from decode.engine.generate import score
from decode.engine.sequence import SamplingParams
from decode.fitting.fit import best_scale, compare, fit_weights, rounded
from decode.fitting.hidden_states import END, hidden_states
from decode.fitting.newton import Bounds
from decode.model.packed_llama import PackedLlama

TRUE = {"L": 0.7, "S": 0.4, "A": -0.2}
TEXTS = 40


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed) for seed, name in enumerate(TRUE)}


@pytest.fixture(scope="module")
def texts(models):
    """Prompts for each member, and texts sampled from a known combination; a third of them have an end."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(2, TINY.vocab_size, (int(length),), generator=generator).tolist() for length in lengths)
        for lengths in torch.randint(1, 12, (TEXTS, len(TRUE)), generator=generator)
    ]
    by_member = {name: [prompt[n] for prompt in prompts] for n, name in enumerate(TRUE)}
    sampled = translate(Ensemble(models, TRUE), by_member, 30, params=SamplingParams(temperature=1.0, seed=1))
    return prompts, sampled.tokens


@pytest.fixture(scope="module")
def data(models, texts):
    found, end = hidden_states(Ensemble(models, TRUE), *texts, batch_size=7).with_end(np.ones(3))
    assert end == 1
    return found


@pytest.fixture(scope="module")
def logits_TVN(models, texts):
    """All logits at all positions, in float64 and one text at a time."""
    found = []
    for n, name in enumerate(TRUE):
        model = copy.deepcopy(models[name]).double()
        with torch.no_grad():
            found.append(
                torch.cat(
                    [
                        model(torch.tensor([[*prompt[n], *target]]))[0, len(prompt[n]) - 1 :]
                        for prompt, target in zip(*texts)
                    ]
                )
            )
    return torch.stack(found, dim=2)


def naive(logits_TVN, targets):
    token_T = torch.tensor([token for target in targets for token in (*target, 1)])

    def value(weights_N):
        return torch.nn.functional.cross_entropy(logits_TVN @ weights_N, token_T)

    return value


def gradient_of(value, weights_N):
    return torch.autograd.functional.jacobian(value, weights_N).numpy()


def by_scipy(value, count, l2=0.0, prior=1.0, bounds=None):
    def with_gradient(weights_N):
        weights_N = torch.tensor(weights_N, requires_grad=True)
        result = value(weights_N) + l2 / 2 * ((weights_N - prior) ** 2).sum()
        (gradient_N,) = torch.autograd.grad(result, weights_N)
        return result.item(), gradient_N.numpy()

    options = {"ftol": 1e-16, "gtol": 1e-10, "maxiter": 1000}
    start_N = np.full(count, 0.3)
    return minimize(with_gradient, start_N, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.4, -0.2), (0.5, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_value_gradient_and_hessian_are_autograds_in_float64(data, texts, logits_TVN, weights):
    value, weights_N = naive(logits_TVN, texts[1]), torch.tensor(weights, dtype=torch.float64)
    found = data.objective(np.array(weights))
    assert data.tokens == len(logits_TVN) == sum(len(target) + 1 for target in texts[1])
    assert found.value == pytest.approx(value(weights_N).item(), rel=1e-6)
    assert found.gradient_N == pytest.approx(gradient_of(value, weights_N), abs=2e-5)
    hessian_NN = torch.autograd.functional.hessian(value, weights_N).numpy()
    assert found.hessian_NN == pytest.approx(hessian_NN, rel=1e-4, abs=2e-4)
    assert data.nats(np.array(weights)) == pytest.approx(data.derivatives(np.array(weights))[:, 0], abs=1e-3)


def test_texts_have_their_own_sums(data, texts, logits_TVN):
    weights_N = np.array([0.7, 0.4, -0.2])
    found_SK, start = data.derivatives(weights_N), 0
    for index, target in enumerate(texts[1]):
        tokens = len(target) + 1
        value = naive(logits_TVN[start : start + tokens], [target])
        start += tokens
        hessian_NN = torch.autograd.functional.hessian(value, torch.tensor(weights_N)).numpy()
        assert found_SK[index, 0] == pytest.approx(value(torch.tensor(weights_N)).item() * tokens, abs=1e-3)
        gradient_N = gradient_of(value, torch.tensor(weights_N)) * tokens
        assert found_SK[index, 1:4] == pytest.approx(gradient_N, abs=1e-3)
        assert found_SK[index, 4:] == pytest.approx(hessian_NN.ravel() * tokens, rel=1e-3, abs=5e-3)


def test_fitted_weights_are_scipys_on_the_same_logits_from_any_start(data, texts, logits_TVN):
    expected_N = by_scipy(naive(logits_TVN, texts[1]), 3)
    fit = fit_weights(data, np.ones(3), np.ones(3))
    assert fit.minimum.converged
    assert fit.weights_N == pytest.approx(expected_N, abs=1e-4)
    for start_N in np.random.default_rng(0).normal(size=(2, 3)):
        assert fit_weights(data, start_N, np.ones(3)).weights_N == pytest.approx(fit.weights_N, abs=1e-4)


def test_a_coarse_fit_first_leads_to_the_same_weights_for_less(data, monkeypatch):
    whole = fit_weights(data, np.ones(3), np.ones(3))
    scale, nats = best_scale(data, np.ones(3))
    monkeypatch.setattr("decode.fitting.fit.COARSE_TOKENS", 100)
    coarse = fit_weights(data, np.ones(3), np.ones(3))
    assert coarse.weights_N == pytest.approx(whole.weights_N, abs=1e-5)
    assert coarse.minimum.steps < whole.minimum.steps
    assert best_scale(data, np.ones(3)) == pytest.approx((scale, nats), abs=1e-5)


def test_text_sampled_from_a_combination_gives_its_weights_back_within_their_errors(data):
    fit = fit_weights(data, np.ones(3), np.ones(3))
    off_N = (fit.weights_N - list(TRUE.values())) / fit.error_N
    assert np.abs(off_N).max() < 3


def test_standard_errors_are_near_those_of_leaving_one_text_out(data):
    texts = 20

    def subset(kept_T):
        return replace(data.select(kept_T), texts=texts)

    fit = fit_weights(subset(data.text_T < texts), np.ones(3), np.ones(3))
    without = []
    for left_out in range(texts):
        part = subset((data.text_T < texts) & (data.text_T != left_out))
        without.append(fit_weights(part, fit.weights_N, np.ones(3)).weights_N)
    about_SN = np.array(without) - np.mean(without, axis=0)
    jackknife_N = np.sqrt((texts - 1) / texts * (about_SN**2).sum(axis=0))
    assert fit.error_N == pytest.approx(jackknife_N, rel=0.2)


def test_pull_and_bounds_are_scipys(data, texts, logits_TVN):
    value = naive(logits_TVN, texts[1])
    penalized = fit_weights(data, np.ones(3), np.ones(3), l2=0.5)
    assert penalized.weights_N == pytest.approx(by_scipy(value, 3, l2=0.5), abs=1e-4)
    bounded = fit_weights(data, np.ones(3), np.ones(3), bounds=Bounds(low=0.0))
    assert bounded.weights_N == pytest.approx(by_scipy(value, 3, bounds=[(0, None)] * 3), abs=1e-4)
    assert bounded.weights_N[2] == 0.0
    assert np.isnan(bounded.error_N).tolist() == [False, False, True]
    assert bounded.minimum.gradient_norm < 1e-5
    assert bounded.minimum.function.gradient_N[2] > 0


def test_of_two_members_that_are_the_same_only_the_sum_counts(models, texts):
    doubled = Ensemble({**models, "twin": models["S"]}, {**TRUE, "twin": 1.0})
    prompts = [(*prompt, prompt[1]) for prompt in texts[0]]
    twins, _ = hidden_states(doubled, prompts, texts[1]).with_end(np.ones(4))
    prior_N = np.array([1.0, 1.0, 0.0, 0.5])
    fit = fit_weights(twins, prior_N, prior_N)
    alone, _ = hidden_states(Ensemble(models, TRUE), *texts).with_end(np.ones(3))
    expected_N = fit_weights(alone, np.ones(3), np.ones(3)).weights_N
    assert fit.weights_N[[0, 2]] == pytest.approx(expected_N[[0, 2]], abs=1e-4)
    assert fit.weights_N[1] + fit.weights_N[3] == pytest.approx(expected_N[1], abs=1e-4)
    assert fit.weights_N[1] - fit.weights_N[3] == pytest.approx(0.5, abs=1e-3)
    assert np.abs(fit.minimum.null_KN) == pytest.approx(np.array([[0.0, 0.5**0.5, 0.0, 0.5**0.5]]), abs=1e-3)


def test_the_scale_of_a_sum_is_the_best_of_its_ray(data, texts, logits_TVN):
    value = naive(logits_TVN, texts[1])
    scale, nats = best_scale(data, np.array([1.0, 1.0, 0.0]))
    direction_N = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    (expected,) = by_scipy(lambda scale_1: value(scale_1 * direction_N), 1)
    assert scale == pytest.approx(expected, abs=1e-4)
    assert nats == pytest.approx(value(expected * direction_N).item(), abs=1e-5)


def test_gains_over_fixed_weights_are_differences_of_their_likelihoods(data, texts, logits_TVN):
    value = naive(logits_TVN, texts[1])
    fit = fit_weights(data, np.ones(3), np.ones(3))
    fixed = {"L + S + A": np.ones(3), "L": np.array([1.0, 0.0, 0.0])}
    for row in compare(fit, data, fixed):
        nats = value(torch.tensor(fixed[row["expression"]])).item()
        assert row["nats"] == pytest.approx(nats, rel=1e-5)
        assert row["gain"] == pytest.approx(nats - fit.minimum.function.value, abs=1e-4)
        assert 0 < row["gain_error"] < row["gain"]


def test_with_one_stop_token_likelihoods_are_those_of_scoring(models, texts, data):
    scored = {index: sum(completion.logprobs) for index, completion in score(Ensemble(models, TRUE), *texts)}
    nats_S = data.nats(np.array(list(TRUE.values())))
    assert nats_S == pytest.approx([-scored[index] for index in range(TEXTS)], abs=1e-3)


def test_of_several_stop_tokens_the_most_likely_is_the_end(texts):
    models = {name: tiny_model(seed, eos_token_id=(1, 2, 3)) for seed, name in enumerate(TRUE)}
    every = hidden_states(Ensemble(models, TRUE), *texts)
    assert every.stops == (1, 2, 3)
    ends_T = every.token_T == END
    assert int(ends_T.sum()) == TEXTS
    weights_N = np.array([0.7, 0.4, -0.2])
    found, end = every.with_end(weights_N)
    sums = {}
    for stop in every.stops:
        target_TG = every.token_T.masked_fill(ends_T, stop)[:, None]
        sums[stop] = float(every.logprobs(weights_N, target_TG)[ends_T].sum())
    assert end == max(sums, key=sums.get)
    assert set(found.token_T[ends_T].tolist()) == {end}


def test_without_stop_tokens_there_is_no_end(texts):
    ensemble = Ensemble({name: tiny_model(seed, eos_token_id=()) for seed, name in enumerate(TRUE)}, TRUE)
    prompts, targets = zip(*((prompt, target) for prompt, target in zip(*texts) if target))
    found, end = hidden_states(ensemble, prompts, targets).with_end(np.ones(3))
    assert end is None
    assert found.token_T.tolist() == [token for target in targets for token in target]


def test_no_logits_are_made_while_texts_are_read(models, texts, monkeypatch):
    monkeypatch.setattr(PackedLlama, "logits", None)
    assert hidden_states(Ensemble(models, TRUE), *texts).texts == TEXTS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight_dtype", [*WEIGHT_DTYPES, "plain"])
def test_the_output_matrix_is_what_makes_logits_of_hidden_states(tied, weight_dtype):
    model = tiny_model(4, tie_word_embeddings=tied)
    torch.nn.init.normal_(model.model.norm.weight, 1.0, 0.3)
    prepared = PackedLlama(model, weight_dtype)
    output_VD = prepared.output_matrix()
    assert output_VD.shape == (TINY.vocab_size, TINY.hidden_size)
    hidden_RD = torch.randn(70, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    expected_RV = prepared.logits(hidden_RD)
    found_RV = hidden_RD.to(output_VD.dtype).float() @ output_VD.float().T
    fine = weight_dtype in ("float32", "float16", "plain")
    assert found_RV == pytest.approx(expected_RV.numpy(), abs=1e-4 if fine else 0.02 * float(expected_RV.abs().max()))


@pytest.mark.parametrize("weight", [0.1, 1 / 3, -2.0, 0.0, 1e-20, 123456.789])
def test_a_rounded_weight_is_the_same_float32(weight):
    assert np.float32(rounded(weight)) == np.float32(weight)
    assert len(repr(rounded(weight))) <= 16
