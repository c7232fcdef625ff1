"""Damped Newton for a convex function of a few weights, within bounds, with a certificate of the minimum.

A step goes to the minimum of the quadratic model within the bounds and is shortened until the function falls enough
(Armijo). The certificate: the norm of the projected gradient, zero at the minimum and nowhere else (Karush, Kuhn,
Tucker), the smallest eigenvalue of the Hessian, and the Newton decrement, the decrease that the model still predicts.

The penalty (w - prior)' M (w - prior) / 2 is added: M = lambda I for --l2, and a term along each null direction of the
Hessian, in which the function is constant: it moves the weights to the prior's there and changes nothing else.

Nothing here knows models or text. All is float64, but the function may have float32's precision.

    N weights  K null directions  S texts
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRADIENT_NORM = 1e-6
MAX_STEPS = 100
MIN_STEP_LENGTH, MAX_CUT = 2.0**-30, 1 / 64
# Decreases below this are lost in the rounding of the value.
MIN_DECREMENT = 1e-15
# The error of a mean of float32 terms of about one nat.
VALUE_NOISE = 1e-7
SUFFICIENT_DECREASE = 1e-4
# An eigenvalue of the Hessian below this fraction of the largest counts as zero: float32 moments have no more digits.
NULL_EIGENVALUE = 1e-6
NULL_PENALTY = 1e-3


@dataclass(frozen=True)
class Point:
    """A function's value and derivatives at weights_N, those at which it was evaluated (perhaps rounded)."""

    weights_N: Array
    value: float
    gradient_N: Array
    hessian_NN: Array

    def with_penalty(self, prior_N: Array, penalty_NN: Array) -> "Point":
        """The same point of the function plus (w - prior)' penalty (w - prior) / 2."""
        away_N = self.weights_N - prior_N
        slope_N = penalty_NN @ away_N
        value = self.value + 0.5 * float(away_N @ slope_N)
        return Point(self.weights_N, value, self.gradient_N + slope_N, self.hessian_NN + penalty_NN)


Function = Callable[[Array], Point]


@dataclass(frozen=True)
class Bounds:
    """The same for every weight."""

    low: float = -np.inf
    high: float = np.inf

    def gradient_norm(self, point: Point) -> float:
        """Of the projected gradient: entries that point out of the box at a bound do not count."""
        out_N = (point.weights_N <= self.low) & (point.gradient_N > 0)
        out_N |= (point.weights_N >= self.high) & (point.gradient_N < 0)
        return float(np.linalg.norm(np.where(out_N, 0.0, point.gradient_N)))


NO_BOUNDS = Bounds()


@dataclass(frozen=True)
class Minimum:
    """`point` includes the penalty, `function` does not.   free_N: which weights are strictly inside their bounds.

    null_KN: unit directions in which the function is constant.   decrement: the decrease that the quadratic model
    predicts for one more step.
    """

    point: Point
    function: Point
    free_N: NDArray[np.bool_]
    null_KN: Array
    steps: int
    gradient_norm: float
    decrement: float

    @property
    def eigenvalues(self) -> list[float]:
        """Of the function's own Hessian, without the penalty, ascending."""
        return np.linalg.eigvalsh(self.function.hessian_NN).tolist()

    @property
    def converged(self) -> bool:
        """To the gradient's norm, or as far as the function's precision reaches."""
        return self.gradient_norm <= GRADIENT_NORM or self.decrement <= VALUE_NOISE / 100


def minimise(
    function: Function,
    start_N: Array,
    prior_N: Array | None = None,
    l2: float = 0.0,
    bounds: Bounds = NO_BOUNDS,
    gradient_norm: float = GRADIENT_NORM,
) -> Minimum:
    """The minimum of function(w) + l2/2 |w - prior|^2 within the bounds. prior_N None: the start."""
    prior_N = start_N if prior_N is None else prior_N
    l2_NN, steps = l2 * np.eye(len(start_N)), 0
    at = function(start_N.clip(bounds.low, bounds.high))
    null_penalty = max(NULL_PENALTY * float(np.linalg.eigvalsh(at.hessian_NN)[-1]), GRADIENT_NORM)
    while True:
        null_KN = null_directions(at.hessian_NN + l2_NN)
        penalty_NN = l2_NN + null_penalty * null_KN.T @ null_KN
        point = at.with_penalty(prior_N, penalty_NN)
        weights_N = point.weights_N
        step_N = box_step(point.gradient_N, point.hessian_NN, bounds.low - weights_N, bounds.high - weights_N)
        slope = float(point.gradient_N @ step_N)
        decrement = -slope - 0.5 * float(step_N @ point.hessian_NN @ step_N)
        norm, free_N = bounds.gradient_norm(point), (weights_N > bounds.low) & (weights_N < bounds.high)
        reached = Minimum(point, at, free_N, null_KN, steps, norm, decrement)
        if norm <= gradient_norm or decrement <= MIN_DECREMENT or steps == MAX_STEPS:
            return reached
        length = 1.0
        while length >= MIN_STEP_LENGTH:
            at = function((weights_N + length * step_N).clip(bounds.low, bounds.high))
            trial = at.with_penalty(prior_N, penalty_NN)
            if trial.value <= point.value + SUFFICIENT_DECREASE * length * slope + VALUE_NOISE:
                break
            # Cut to where the slope along the step vanishes: exact for a quadratic.
            trial_slope = float(trial.gradient_N @ step_N)
            length *= float(np.clip(slope / (slope - trial_slope), MAX_CUT, 0.5)) if trial_slope > slope else 0.5
        else:
            return reached
        steps += 1
        if decrement < VALUE_NOISE and bounds.gradient_norm(trial) >= norm:  # the function's precision is reached
            return replace(reached, steps=steps)


def null_directions(hessian_NN: Array) -> Array:
    """(K, N) orthogonal unit directions along which a quadratic form of this matrix vanishes."""
    values_N, vectors_NN = np.linalg.eigh(hessian_NN)
    return vectors_NN.T[values_N <= NULL_EIGENVALUE * max(float(values_N[-1]), 0.0)]


def box_step(gradient_N: Array, hessian_NN: Array, low_N: Array, high_N: Array) -> Array:
    """The minimum of g'd + d'Hd / 2 over low <= d <= high; H is positive definite.

    Of the bounds that the unbounded minimum violates, one at least is active at the bounded minimum: otherwise a short
    way from there to the unbounded minimum would stay inside and go down. So each is tried. There are few weights.
    """
    step_N = -np.linalg.solve(hessian_NN, gradient_N).astype(np.float64)
    candidates = []
    for held in np.flatnonzero((step_N < low_N) | (step_N > high_N)):
        free_N = np.arange(len(step_N)) != held
        candidate_N = np.clip(step_N, low_N, high_N)
        slope_N = gradient_N[free_N] + hessian_NN[free_N, held] * candidate_N[held]
        candidate_N[free_N] = box_step(slope_N, hessian_NN[np.ix_(free_N, free_N)], low_N[free_N], high_N[free_N])
        candidates.append(candidate_N)
    return min(candidates, key=lambda d_N: gradient_N @ d_N + d_N @ hessian_NN @ d_N / 2) if candidates else step_N


def standard_errors(minimum: Minimum, tokens: int, gradient_SN: Array) -> Array:
    """(N,) by the sandwich H^-1 (sum_s g_s g_s') H^-1 with texts as the independent units (White 1982, Huber 1967):
    valid whatever the dependence within a text, and for a model that is not the true one.

    gradient_SN: each text's gradient at the minimum, a sum over its tokens, where the function is a mean over all
    tokens. The penalty counts as fixed. NaN for a weight at its bound and for fewer than two texts.
    """
    texts, free_N = len(gradient_SN), minimum.free_N
    errors_N = np.full(len(free_N), np.nan)
    if texts > 1:
        about_SN = (gradient_SN - gradient_SN.mean(axis=0))[:, free_N]
        hessian_NN = tokens * minimum.point.hessian_NN[np.ix_(free_N, free_N)]
        half_NS = np.linalg.solve(hessian_NN, about_SN.T)
        errors_N[free_N] = np.sqrt(texts / (texts - 1) * (half_NS**2).sum(axis=1))
    return errors_N
