"""Weights fitted to texts by likelihood, and what is to be said about them. Nothing here reads files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decode.engine.expression import spell
from decode.fitting.newton import Bounds, Minimum, Point, minimise, standard_errors
from decode.fitting.hidden_states import Array, TeacherForced

# The way to the minimum is looked for on about so many places, and gone to its end on all.
COARSE_TOKENS = 1024
COARSE_NORM = 1e-3
# Random starts are drawn this far around zero: plain sums have ones.
START_SPREAD = 1.0


@dataclass(frozen=True)
class Fit:
    """weights_N: those of the minimum in the fewest decimal digits that are the same float32 numbers."""

    minimum: Minimum
    weights_N: Array
    error_N: Array


def rounded(weight: float) -> float:
    """The shortest decimal number that is the same float32."""
    return float(str(np.float32(weight)))


def spell_weights(weights_N: Array, names: Sequence[str]) -> str:
    return spell({name: float(weight) for name, weight in zip(names, weights_N) if weight})


def mean_nats(data: TeacherForced) -> Callable[[Array], Point]:
    """The function that is minimised: negative log-likelihood, nats a token."""

    def function(weights_N: Array) -> Point:
        found = data.likelihood(weights_N)
        parts = found.nats_S.sum(), found.gradient_SN.sum(axis=0), found.hessian_SNN.sum(axis=0)
        value, gradient_N, hessian_NN = (part / found.tokens for part in parts)
        return Point(found.weights_N, float(value), gradient_N, hessian_NN)

    return function


def fit_weights(
    data: TeacherForced,
    start_N: Array,
    centre_N: Array,
    l2: float = 0.0,
    bounds: Bounds | None = None,
    tell: Callable[[str], None] | None = None,
    coarse: bool = True,
) -> Fit:
    """The likeliest weights, from any start, with the pull of `l2` towards the centre; `tell` gets a line a step.

    coarse: begin with a fit on a part of the places, which costs a part of the time.
    """
    function = mean_nats(data)
    if coarse and data.tokens >= 4 * COARSE_TOKENS:
        part = mean_nats(data.thinned(COARSE_TOKENS))
        start_N = minimise(part, start_N, centre_N, l2, bounds, COARSE_NORM).function.weights_N

    def told(weights_N: Array) -> Point:
        point = function(weights_N)
        if tell is not None:
            tell(f"{point.value:.6f} nats a token, gradient {np.linalg.norm(point.gradient_N):.1e}")
        return point

    minimum = minimise(told, start_N, centre_N, l2, bounds)
    weights_N = np.array([rounded(weight) for weight in minimum.function.weights_N])
    gradient_SN = data.likelihood(weights_N).gradient_SN
    return Fit(minimum, weights_N, standard_errors(minimum, data.tokens, gradient_SN))


def describe(fit: Fit, data: TeacherForced, names: Sequence[str]) -> dict[str, Any]:
    """Weights, standard errors and the certificate."""
    minimum = fit.minimum
    weights = dict(zip(names, map(float, fit.weights_N)))
    return {
        "objective": "likelihood",
        "combine": spell_weights(fit.weights_N, names),
        "weights": weights,
        "standard_errors": dict(zip(names, map(float, fit.error_N))),
        "fit": {
            "texts": data.texts,
            "tokens": data.tokens,
            "nats": minimum.function.value,
            "steps": minimum.steps,
            "converged": minimum.converged,
            "gradient_norm": minimum.gradient_norm,
            "smallest_eigenvalue": minimum.smallest_eigenvalue,
            "largest_eigenvalue": float(np.linalg.eigvalsh(minimum.function.hessian_NN)[-1]),
            "left_to_gain": max(minimum.decrement, 0.0),
            "at_bounds": [name for name, free in zip(names, minimum.bounds.free(minimum.point)) if not free],
            "flat": [spell(_direction(flat_N, names)) for flat_N in minimum.flat_KN],
        },
    }


def _direction(flat_N: Array, names: Sequence[str]) -> dict[str, float]:
    largest = np.abs(flat_N).max()
    return {name: round(float(x / largest), 3) for name, x in zip(names, flat_N) if abs(x) > 1e-3 * largest}


def best_scale(data: TeacherForced, centre_N: Array, coarse: bool = True) -> tuple[float, float]:
    """The factor that makes a sum likeliest, one over its temperature, and the nats a token it then has.

    How much too sure of itself the sum is; greedy translations are the same at every temperature.
    """
    function, start_1 = mean_nats(data), np.ones(1)
    if coarse and data.tokens >= 4 * COARSE_TOKENS:
        start_1[0] = best_scale(data.thinned(COARSE_TOKENS), centre_N, coarse=False)[0]

    def along(scale_1: Array) -> Point:
        point = function(scale_1[0] * centre_N)
        scale_1 = np.array([point.weights_N @ centre_N / (centre_N @ centre_N)])
        slope_1 = np.array([point.gradient_N @ centre_N])
        return Point(scale_1, point.value, slope_1, (centre_N @ point.hessian_NN @ centre_N)[None, None])

    found = minimise(along, start_1)
    return float(found.point.weights_N[0]), found.function.value


def compare(
    fit: Fit, data: TeacherForced, against: Mapping[str, Array], held_out: TeacherForced | None = None
) -> list[dict[str, Any]]:
    """The likelihood of fixed weights, and what the fitted ones gain, with its standard error (texts are the units)."""
    rows: list[dict[str, Any]] = []
    texts = {"": data} if held_out is None else {"": data, "held_out_": held_out}
    fitted = {kind: part.nats(fit.weights_N) for kind, part in texts.items()}
    for expression, weights_N in against.items():
        row: dict[str, Any] = {"expression": expression}
        for kind, part in texts.items():
            nats_S = part.nats(weights_N)
            gain, error = gain_of(nats_S - fitted[kind], part)
            row |= {f"{kind}nats": float(nats_S.sum()) / part.tokens, f"{kind}gain": gain, f"{kind}gain_error": error}
        rows.append(row)
    return rows


def gain_of(gain_S: Array, data: TeacherForced) -> tuple[float, float]:
    """Mean a token of what differs text by text, and its standard error (of a ratio of sums; NaN for one text)."""
    mean = float(gain_S.sum()) / data.tokens
    length_S = np.bincount(data.text_T.cpu().numpy(), minlength=data.texts)
    if data.texts < 2:
        return mean, float("nan")
    about_S = gain_S - mean * length_S
    return mean, float(np.sqrt(data.texts / (data.texts - 1) * (about_S**2).sum()) / data.tokens)


def same_from_other_starts(
    fit: Fit, data: TeacherForced, centre_N: Array, l2: float, bounds: Bounds, count: int, seed: int
) -> dict[str, Any]:
    """Fits from random starts; how far from the first fit the farthest of them ends."""
    generator = np.random.default_rng(seed)
    away, nats, norms = [], [], []
    for _ in range(count):
        start_N = generator.normal(0.0, START_SPREAD, len(centre_N))
        other = fit_weights(data, start_N, centre_N, l2, bounds, coarse=False)
        away.append(float(np.abs(other.weights_N - fit.weights_N).max()))
        nats.append(abs(other.minimum.function.value - fit.minimum.function.value))
        norms.append(other.minimum.gradient_norm)
    return {
        "count": count,
        "seed": seed,
        "largest_weight_difference": max(away),
        "largest_nats_difference": max(nats),
        "largest_gradient_norm": max(norms),
    }
