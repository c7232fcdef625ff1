"""Newton's method within bounds against scipy, enumeration and cases by hand; small functions in float64."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from decode.fitting.newton import Bounds, Point, box_step, minimise, null_directions


def log_linear(seed, positions=30, entries=7, members=3, scale=2.0):
    """Negative log-likelihood of a log-linear model over random features: what decode.tune minimises, without models.

    Half of the answers are the first member's best entry, so that the minimum is finite.
    """
    generator = np.random.default_rng(seed)
    x_TVN = generator.normal(0.0, scale, (positions, entries, members))
    y_T = np.where(np.arange(positions) % 2, x_TVN[:, :, 0].argmax(axis=1), generator.integers(0, entries, positions))
    own_TN = x_TVN[np.arange(positions), y_T]

    def function(weights_N):
        logits_TV = x_TVN @ weights_N
        peak_T1 = logits_TV.max(axis=1, keepdims=True)
        p_TV = np.exp(logits_TV - peak_T1)
        total_T1 = p_TV.sum(axis=1, keepdims=True)
        p_TV /= total_T1
        value = (peak_T1[:, 0] + np.log(total_T1[:, 0]) - own_TN @ weights_N).mean()
        mean_TN = np.einsum("tv,tvn->tn", p_TV, x_TVN)
        about_TVN = x_TVN - mean_TN[:, None]
        hessian_NN = np.einsum("tv,tvn,tvm->nm", p_TV, about_TVN, about_TVN) / positions
        return Point(np.asarray(weights_N, dtype=float), value, (mean_TN - own_TN).mean(axis=0), hessian_NN)

    return function


def by_scipy(function, start_N, l2=0.0, prior_N=0.0, bounds=None):
    def value(weights_N):
        point = function(weights_N)
        away_N = weights_N - prior_N
        return point.value + l2 / 2 * away_N @ away_N, point.gradient_N + l2 * away_N

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    return minimize(value, start_N, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.1, 1.0, 5.0]))
def test_the_minimum_is_scipys_from_near_and_far(seed, members, far):
    function = log_linear(seed, members=members)
    start_N = np.random.default_rng(seed).normal(0.0, far, members)
    found = minimise(function, start_N)
    assert found.converged
    assert found.gradient_norm <= 1e-6
    assert found.point.weights_N == pytest.approx(by_scipy(function, np.zeros(members)), abs=1e-5)
    assert found.eigenvalues[0] == pytest.approx(np.linalg.eigvalsh(found.function.hessian_NN)[0])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(-0.5, 0.09), st.floats(0.1, 0.3), st.sampled_from([0.0, 0.05]))
def test_within_bounds_the_minimum_is_scipys_and_no_gradient_points_inside(seed, low, high, l2):
    function, prior_N = log_linear(seed, members=4), np.full(4, 0.25)
    found = minimise(function, prior_N, prior_N, l2, Bounds(low, high))
    expected_N = by_scipy(function, np.full(4, low), l2, prior_N, [(low, high)] * 4)
    assert found.point.weights_N == pytest.approx(expected_N, abs=1e-5)
    assert found.gradient_norm <= 1e-6
    for weight, slope in zip(found.point.weights_N, found.point.gradient_N):
        assert low <= weight <= high
        assert slope >= -1e-6 or weight == high
        assert slope <= 1e-6 or weight == low


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_a_step_within_bounds_is_the_best_of_all_active_sets(seed, count):
    generator = np.random.default_rng(seed)
    root_NN = generator.normal(size=(count, count))
    hessian_NN, gradient_N = root_NN @ root_NN.T + 0.01 * np.eye(count), generator.normal(0.0, 3.0, count)
    low_N = -generator.choice([0.0, 0.3, 2.0, np.inf], count)
    high_N = generator.choice([0.0, 0.3, 2.0, np.inf], count)

    def value(step_N):
        return gradient_N @ step_N + step_N @ hessian_NN @ step_N / 2

    best = np.inf
    for held in product(("free", "low", "high"), repeat=count):
        step_N = np.array([{"free": 0.0, "low": low, "high": high}[h] for h, low, high in zip(held, low_N, high_N)])
        if not np.isfinite(step_N).all():
            continue
        free_N = np.array([h == "free" for h in held])
        if free_N.any():
            rest_N = gradient_N[free_N] + hessian_NN[np.ix_(free_N, ~free_N)] @ step_N[~free_N]
            step_N[free_N] = -np.linalg.solve(hessian_NN[np.ix_(free_N, free_N)], rest_N)
        if (step_N >= low_N - 1e-12).all() and (step_N <= high_N + 1e-12).all():
            best = min(best, value(step_N))
    found_N = box_step(gradient_N, hessian_NN, low_N, high_N)
    assert (found_N >= low_N).all()
    assert (found_N <= high_N).all()
    assert value(found_N) == pytest.approx(best, abs=1e-8)


def test_an_l2_penalty_is_scipys_and_a_strong_one_keeps_the_prior_weights():
    function, prior_N = log_linear(1), np.array([1.0, 1.0, -1.0])
    found = minimise(function, np.zeros(3), prior_N, l2=0.3)
    assert found.point.weights_N == pytest.approx(by_scipy(function, np.zeros(3), 0.3, prior_N), abs=1e-6)
    assert minimise(function, np.zeros(3), prior_N, l2=1e6).point.weights_N == pytest.approx(prior_N, abs=1e-4)


def test_along_a_null_direction_weights_stay_at_the_priors():
    """Members 0 and 2 are the same: only their sum counts, and the best sum is that of two members."""
    two = log_linear(2, members=2)
    spread_NK = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    def function(weights_N):
        point = two(spread_NK.T @ weights_N)
        hessian_NN = spread_NK @ point.hessian_NN @ spread_NK.T
        return Point(weights_N, point.value, spread_NK @ point.gradient_N, hessian_NN)

    expected_K = minimise(two, np.zeros(2)).point.weights_N
    for start_N in (np.zeros(3), np.array([3.0, -1.0, -2.0])):
        found = minimise(function, start_N, prior_N=np.array([1.0, 0.0, 0.4]))
        assert spread_NK.T @ found.point.weights_N == pytest.approx(expected_K, abs=1e-6)
        assert found.point.weights_N[0] - found.point.weights_N[2] == pytest.approx(0.6, abs=1e-6)
        assert np.abs(found.null_KN) == pytest.approx(np.array([[0.5**0.5, 0.0, 0.5**0.5]]), abs=1e-9)
        assert found.eigenvalues[0] == pytest.approx(0.0, abs=1e-9)


def test_null_directions_are_those_of_eigenvalue_zero():
    null_KN = null_directions(np.diag([4.0, 0.0, 1.0, 1e-9]))
    assert np.abs(null_KN).sum(axis=0) == pytest.approx([0.0, 1.0, 0.0, 1.0])
    assert null_directions(np.eye(3)).shape == (0, 3)
    assert null_directions(np.zeros((2, 2))).shape == (2, 2)


def test_a_function_in_float32_is_minimised_to_its_precision():
    fine = log_linear(3)

    def rough(weights_N):
        point = fine(np.float32(weights_N).astype(float))
        parts = (np.float32(part).astype(float) for part in (point.value, point.gradient_N, point.hessian_NN))
        return Point(point.weights_N, *parts)

    found = minimise(rough, np.zeros(3), gradient_norm=0.0)
    assert found.steps < 20
    assert found.converged
    assert found.point.weights_N == pytest.approx(minimise(fine, np.zeros(3)).point.weights_N, abs=1e-5)
