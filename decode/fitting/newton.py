"""Newton's method for a convex function of a few weights, within bounds, with a certificate.

Each step goes to the minimum of the quadratic model within the bounds (an active set; the weights are at most eight).
It is shortened until the function falls enough (Armijo), each time to where the slope along it would vanish. What is
known at the end: the norm of the projected gradient, zero at the minimum and nowhere else (Karush, Kuhn, Tucker), and
the Newton decrement, which says what is left to gain.

Added to the function may be pulls, (w - centre)' M (w - centre) / 2: an L2 penalty is M = lambda I. Where the Hessian
is singular along a direction the data says nothing about it: a pull along that direction alone holds the weights where
the centre has them and changes nothing else.

Nothing here knows models or text. float64 throughout, but the function may be as rough as float32 makes it.

    N weights  K directions
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRADIENT_NORM = 1e-6
MOST_STEPS = 100
# A Newton step that promises less than this is lost in the rounding of the value.
LEAST_GAIN = 1e-15
# Two values of a function that is a mean of float32 terms are not told apart below this, relative to one nat.
VALUE_NOISE = 1e-7
SUFFICIENT_DECREASE = 1e-4
SHORTEST_STEP, SHORTEST_CUT = 2.0**-30, 1 / 64
# An eigenvalue of the Hessian below this share of the largest is zero: float32 moments know no better.
FLAT = 1e-6
FLAT_PULL = 1e-3
AT_BOUND = 1e-12


@dataclass(frozen=True)
class Point:
    """A function's value and derivatives at weights_N, where it was evaluated (perhaps rounded from what was asked)."""

    weights_N: Array
    value: float
    gradient_N: Array
    hessian_NN: Array


Function = Callable[[Array], Point]


@dataclass(frozen=True)
class Bounds:
    low_N: Array
    high_N: Array

    @classmethod
    def none(cls, count: int) -> "Bounds":
        return cls(np.full(count, -np.inf), np.full(count, np.inf))

    def inside(self, weights_N: Array) -> Array:
        """The nearest weights within the bounds; those at a bound but for rounding are at it."""
        weights_N = np.where(weights_N <= self.low_N + AT_BOUND, self.low_N, weights_N)
        return np.where(weights_N >= self.high_N - AT_BOUND, self.high_N, weights_N)

    def projected(self, point: Point) -> Array:
        """The gradient without the parts that a bound holds back: zero exactly at the constrained minimum."""
        gradient_N = point.gradient_N.copy()
        gradient_N[(point.weights_N <= self.low_N) & (gradient_N > 0)] = 0.0
        gradient_N[(point.weights_N >= self.high_N) & (gradient_N < 0)] = 0.0
        return gradient_N

    def free(self, point: Point) -> NDArray[np.bool_]:
        """(N,) which weights no bound holds."""
        return (point.weights_N > self.low_N) & (point.weights_N < self.high_N)


@dataclass(frozen=True)
class Minimum:
    """`point` has the pulls in it, `function` not. gradient_norm: projected. decrement: what the quadratic model says
    is left to gain.   flat_KN: unit directions in which the function does not change.
    """

    point: Point
    function: Point
    bounds: Bounds
    pull_NN: Array
    flat_KN: Array
    steps: int
    gradient_norm: float
    decrement: float

    @property
    def smallest_eigenvalue(self) -> float:
        """Of the function's own Hessian, without pulls."""
        return float(np.linalg.eigvalsh(self.function.hessian_NN)[0])

    @property
    def converged(self) -> bool:
        """To the gradient's norm, or as far as the function's precision reaches."""
        return self.gradient_norm <= GRADIENT_NORM or self.decrement <= VALUE_NOISE / 100


def minimise(
    function: Function,
    start_N: Array,
    centre_N: Array | None = None,
    l2: float = 0.0,
    bounds: Bounds | None = None,
    gradient_norm: float = GRADIENT_NORM,
) -> Minimum:
    """The minimum of function(w) + l2/2 |w - centre|^2 within the bounds; the start is brought inside them."""
    count = len(start_N)
    centre_N = start_N if centre_N is None else centre_N
    bounds = bounds or Bounds.none(count)
    flat_KN = np.empty((0, count))
    at = function(bounds.inside(start_N))
    steps = 0
    while True:
        pull_NN = l2 * np.eye(count)
        new_KN = flat_directions(at.hessian_NN + pull_NN, flat_KN)
        flat_KN = np.concatenate((flat_KN, new_KN))
        largest = float(np.linalg.eigvalsh(at.hessian_NN)[-1])
        pull_NN += max(FLAT_PULL * largest, GRADIENT_NORM) * flat_KN.T @ flat_KN
        found = _newton(function, at, centre_N, pull_NN, bounds, gradient_norm)
        at, steps = found.function, steps + found.steps
        if not len(flat_directions(at.hessian_NN + l2 * np.eye(count), flat_KN)):
            return Minimum(found.point, at, bounds, pull_NN, flat_KN, steps, found.gradient_norm, found.decrement)


def flat_directions(hessian_NN: Array, known_KN: Array) -> Array:
    """(K, N) unit directions, orthogonal to the known ones, along which a quadratic form of this matrix vanishes."""
    without_NN = np.eye(len(hessian_NN)) - known_KN.T @ known_KN
    values_N, vectors_NN = np.linalg.eigh(without_NN @ hessian_NN @ without_NN)
    largest = max(float(values_N[-1]), 0.0)
    # The known directions have eigenvalue zero here too.
    new = [vector_N for value, vector_N in zip(values_N, vectors_NN.T) if value <= FLAT * largest]
    new = [vector_N for vector_N in new if np.linalg.norm(without_NN @ vector_N) > 0.5]
    return np.array(new).reshape(-1, len(hessian_NN))


@dataclass(frozen=True)
class _Found:
    point: Point
    function: Point
    steps: int
    gradient_norm: float
    decrement: float


def _newton(
    function: Function, at: Point, centre_N: Array, pull_NN: Array, bounds: Bounds, gradient_norm: float
) -> _Found:
    point, steps = _pulled(at, centre_N, pull_NN), 0
    while True:
        step_N = box_step(
            point.gradient_N, point.hessian_NN, bounds.low_N - point.weights_N, bounds.high_N - point.weights_N
        )
        slope = float(point.gradient_N @ step_N)
        gain = -slope - 0.5 * float(step_N @ point.hessian_NN @ step_N)
        norm = float(np.linalg.norm(bounds.projected(point)))
        if norm <= gradient_norm or gain <= LEAST_GAIN or steps == MOST_STEPS:
            break
        length = 1.0
        while True:
            other = function(bounds.inside(point.weights_N + length * step_N))
            pulled = _pulled(other, centre_N, pull_NN)
            if pulled.value <= point.value + SUFFICIENT_DECREASE * length * slope + VALUE_NOISE:
                break
            # Where the slope along the way would vanish: exact for a quadratic, short where the function gets steep.
            there = float(pulled.gradient_N @ step_N)
            length *= float(np.clip(slope / (slope - there), SHORTEST_CUT, 0.5)) if there > slope else 0.5
            if length < SHORTEST_STEP:
                return _Found(point, at, steps, norm, gain)
        steps += 1
        better = float(np.linalg.norm(bounds.projected(pulled))) < norm
        if gain < VALUE_NOISE and not better:  # the precision of the function is reached
            break
        point, at = pulled, other
    return _Found(point, at, steps, norm, gain)


def _pulled(at: Point, centre_N: Array, pull_NN: Array) -> Point:
    away_N = at.weights_N - centre_N
    value = at.value + 0.5 * float(away_N @ pull_NN @ away_N)
    return Point(at.weights_N, value, at.gradient_N + pull_NN @ away_N, at.hessian_NN + pull_NN)


def box_step(gradient_N: Array, hessian_NN: Array, low_N: Array, high_N: Array) -> Array:
    """The minimum of g'd + d'Hd / 2 over low <= d <= high, where low <= 0 <= high and H is positive definite.

    A primal active set (Nocedal and Wright, Numerical Optimization, 2006, chapter 16): go to the minimum over the free
    entries, as far as the first bound in the way, which is then held; at such a minimum let go of the held entry whose
    gradient points most inside.
    """
    step_N = np.zeros_like(gradient_N)
    held_N = np.zeros(len(gradient_N), dtype=bool)
    for _ in range(10 * 2 ** len(gradient_N)):
        slope_N = gradient_N + hessian_NN @ step_N
        way_N = np.zeros_like(step_N)
        if not held_N.all():
            way_N[~held_N] = -np.linalg.solve(hessian_NN[np.ix_(~held_N, ~held_N)], slope_N[~held_N])
        with np.errstate(divide="ignore", invalid="ignore"):
            reach_N = np.where(way_N > 0, (high_N - step_N) / way_N, (low_N - step_N) / way_N)
        reach_N[way_N == 0] = np.inf
        first = int(reach_N.argmin())
        if reach_N[first] < 1:
            step_N = np.clip(step_N + reach_N[first] * way_N, low_N, high_N)
            step_N[first] = high_N[first] if way_N[first] > 0 else low_N[first]
            held_N[first] = True
            continue
        step_N = step_N + way_N
        slope_N = gradient_N + hessian_NN @ step_N
        inward_N = np.where(step_N >= high_N, slope_N, -slope_N) * (held_N & (low_N < high_N))
        worst = int(inward_N.argmax())
        if inward_N[worst] <= 0:
            break
        held_N[worst] = False
    return step_N


def standard_errors(minimum: Minimum, tokens: int, gradient_SN: Array) -> Array:
    """(N,) by the sandwich H^-1 (sum_s g_s g_s') H^-1 with texts as the independent units (White 1982, Huber 1967):
    right whatever the dependence within a text and though no weights are the true ones.

    gradient_SN: each text's gradient at the minimum, a sum over its tokens, where the function is a mean over all
    tokens. Pulls count as fixed. NaN for a weight at its bound and for fewer than two texts.
    """
    errors_N = np.full(gradient_SN.shape[1], np.nan)
    free_N = minimum.bounds.free(minimum.point)
    texts = len(gradient_SN)
    if texts < 2 or not free_N.any():
        return errors_N
    about_SN = (gradient_SN - gradient_SN.mean(axis=0))[:, free_N]
    hessian_NN = tokens * minimum.point.hessian_NN[np.ix_(free_N, free_N)]
    half_NS = np.linalg.solve(hessian_NN, about_SN.T)
    errors_N[free_N] = np.sqrt(texts / (texts - 1) * (half_NS**2).sum(axis=1))
    return errors_N
