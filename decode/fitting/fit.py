"""Maximum-likelihood weights and the report on them: a dictionary for files, lines for a reader.

This file knows neither models nor files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decode.engine.expression import format_weights
from decode.fitting.hidden_states import HiddenStates
from decode.fitting.newton import NO_BOUNDS, Array, Bounds, Function, Minimum, Point, minimise, standard_errors

# A first fit on about so many positions gives the start of the fit on all.
COARSE_TOKENS = 1024
COARSE_NORM = 1e-3


@dataclass(frozen=True)
class Fit:
    """weights_N: those of the minimum in the fewest decimal digits that are the same float32 numbers.

    error_N: standard errors, NaN for a weight at its bound.
    """

    minimum: Minimum
    weights_N: Array
    error_N: Array


def rounded(weight: float) -> float:
    """The shortest decimal number that is the same float32."""
    return float(str(np.float32(weight)))


def format_sum(weights_N: Array, names: Sequence[str]) -> str:
    """The weights as a combination expression; zeros are left out."""
    return format_weights({name: float(weight) for name, weight in zip(names, weights_N) if weight})


def _coarse(data: HiddenStates) -> HiddenStates | None:
    step = data.tokens // COARSE_TOKENS
    return data.select(slice(None, None, step)) if step >= 4 else None


def fit_weights(
    data: HiddenStates,
    start_N: Array,
    prior_N: Array,
    l2: float = 0.0,
    bounds: Bounds = NO_BOUNDS,
    log: Callable[[str], None] = lambda line: None,
) -> Fit:
    """The maximum-likelihood weights, from any start, with an L2 penalty towards the prior weights.

    log: called with a line for each evaluation.
    """
    if (part := _coarse(data)) is not None:
        start_N = minimise(part.objective, start_N, prior_N, l2, bounds, COARSE_NORM).function.weights_N

    def logged(weights_N: Array) -> Point:
        point = data.objective(weights_N)
        log(f"{point.value:.6f} nats per token, gradient {np.linalg.norm(point.gradient_N):.1e}")
        return point

    minimum = minimise(logged, start_N, prior_N, l2, bounds)
    weights_N = np.array([rounded(weight) for weight in minimum.function.weights_N])
    gradient_SN = data.derivatives(weights_N)[:, 1 : 1 + len(weights_N)]
    return Fit(minimum, weights_N, standard_errors(minimum, data.tokens, gradient_SN))


def best_scale(data: HiddenStates, prior_N: Array) -> tuple[float, float]:
    """The factor of a sum (one over its temperature) with the highest likelihood, and its nats per token.

    A factor below 1 means that the sum is over-confident. Greedy translations are the same at every temperature.
    """

    def along(function: Function) -> Function:
        def scaled(scale_1: Array) -> Point:
            point = function(scale_1[0] * prior_N)
            scale_1 = np.array([point.weights_N @ prior_N / (prior_N @ prior_N)])
            slope_1 = np.array([point.gradient_N @ prior_N])
            return Point(scale_1, point.value, slope_1, (prior_N @ point.hessian_NN @ prior_N)[None, None])

        return scaled

    start_1 = np.ones(1)
    if (part := _coarse(data)) is not None:
        start_1 = minimise(along(part.objective), start_1).point.weights_N
    found = minimise(along(data.objective), start_1)
    return float(found.point.weights_N[0]), found.function.value


def compare(
    fit: Fit, data: HiddenStates, against: Mapping[str, Array], held_out: HiddenStates | None = None
) -> list[dict[str, Any]]:
    """Nats per token of fixed weights, and the gain of the fitted ones with its standard error."""
    rows: list[dict[str, Any]] = [{"expression": expression} for expression in against]
    for kind, part in (("", data), ("held_out_", held_out)):
        if part is None:
            continue
        fitted_S = part.nats(fit.weights_N)
        for row, weights_N in zip(rows, against.values()):
            nats_S = part.nats(weights_N)
            gain, error = _gain(nats_S - fitted_S, part)
            row |= {f"{kind}nats": float(nats_S.sum()) / part.tokens, f"{kind}gain": gain, f"{kind}gain_error": error}
    return rows


def _gain(gain_S: Array, data: HiddenStates) -> tuple[float, float]:
    """Mean per token, and its standard error: of a ratio of sums, texts are the units; NaN for one text."""
    mean = float(gain_S.sum()) / data.tokens
    if data.texts < 2:
        return mean, math.nan
    about_S = gain_S - mean * np.bincount(data.text_T.cpu().numpy(), minlength=data.texts)
    return mean, float(np.sqrt(data.texts / (data.texts - 1) * (about_S**2).sum()) / data.tokens)


def describe_fit(fit: Fit, data: HiddenStates, names: Sequence[str]) -> dict[str, Any]:
    """Weights, standard errors and the certificate."""
    minimum = fit.minimum
    directions = [np.round(null_N / np.abs(null_N).max(), 3) for null_N in minimum.null_KN]
    return {
        "objective": "likelihood",
        "combine": format_sum(fit.weights_N, names),
        "weights": dict(zip(names, fit.weights_N.tolist())),
        "standard_errors": dict(zip(names, fit.error_N.tolist())),
        "fit": {
            "texts": data.texts,
            "tokens": data.tokens,
            "nats": minimum.function.value,
            "steps": minimum.steps,
            "converged": minimum.converged,
            "gradient_norm": minimum.gradient_norm,
            "smallest_eigenvalue": minimum.eigenvalues[0],
            "largest_eigenvalue": minimum.eigenvalues[-1],
            "left_to_gain": max(minimum.decrement, 0.0),
            "at_bounds": [name for name, free in zip(names, minimum.free_N) if not free],
            "flat": [format_sum(shares_N, names) for shares_N in directions],
        },
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """What decode.tune prints: weights, likelihoods beside those of fixed expressions, certificate, expression."""
    fit, scale = report["fit"], report["temperature"]
    weights = [["", "weight", "s.e."]]
    for name, weight in report["weights"].items():
        error = report["standard_errors"][name]
        shown = "at its bound" if name in fit["at_bounds"] else "–" if math.isnan(error) else f"{error:.4f}"
        weights.append([name, f"{weight:.4f}", shown])
    nats = [["nats per token"], ["fitted"], *([row["expression"]] for row in report["against"])]
    for kind, title, fitted in (("", "on the text", fit), ("held_out_", "held out", report.get("held_out"))):
        if fitted is None:
            continue
        nats[0] += [title, "gain of the fit"]
        nats[1] += [f"{fitted['nats']:.4f}", ""]
        for cells, row in zip(nats[2:], report["against"]):
            gain, error = row[f"{kind}gain"], row[f"{kind}gain_error"]
            cells += [f"{row[f'{kind}nats']:.4f}", f"{gain:.4f} ± {error:.4f}"]
    notes = [
        f"{fit['texts']:,} texts, {fit['tokens']:,} tokens, {fit['steps']} Newton steps in {fit['seconds']:.1f} s: "
        f"gradient {fit['gradient_norm']:.1e}, smallest eigenvalue of the Hessian {fit['smallest_eigenvalue']:.4g}, "
        f"Newton decrement {fit['left_to_gain']:.1e} nats per token"
    ]
    if not fit["converged"]:
        notes.append("not converged: check the scale of the logits, or give --l2 or --bounds")
    notes += [f"the Hessian is singular along {direction}: there --combine decides" for direction in fit["flat"]]
    confidence = "over-confident" if scale["scale"] < 1 else "under-confident"
    notes.append(
        f"{fit['centre']} is {confidence}: it fits best at temperature {scale['temperature']:.3g} "
        f"({scale['nats']:.4f} nats per token); greedy decoding is the same at every temperature"
    )
    return [*_table(weights), "", *_table(nats), "", *notes, "", f'--combine "{report["combine"]}"']


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]).rstrip()
        for row in rows
    ]
