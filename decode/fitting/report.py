"""What decode.tune prints: its report as lines for a reader."""

import math
from collections.abc import Mapping
from typing import Any


def fit_lines(report: Mapping[str, Any]) -> list[str]:
    """Weights, likelihoods beside those of fixed expressions, the certificate, and the expression to paste."""
    fit = _of_likelihood(report)
    names = list(report["weights"])
    width = max(map(len, names))
    for_bleu = f"{'for BLEU':>12}" if "bleu" in report else ""
    lines = [f"{'':{width}} {'weight':>9}   {'s.e.':12}{for_bleu}".rstrip()]
    for name in names:
        error = report["likeliest_errors" if "bleu" in report else "standard_errors"][name]
        bound = "at its bound" if name in fit["at_bounds"] else "–" if math.isnan(error) else f"{error:.4f}"
        other = f"{report['weights'][name]:12.4f}" if "bleu" in report else ""
        weight = report["likeliest" if "bleu" in report else "weights"][name]
        lines.append(f"{name:{width}} {weight:9.4f}   {bound:12}{other}".rstrip())
    lines += ["", *_likelihoods(report), "", *_certificate(report)]
    scale = report["temperature"]
    sure = "sure" if scale["scale"] < 1 else "unsure"
    lines.append(
        f"{fit['centre']} is best at temperature {scale['temperature']:.3g} ({scale['nats']:.4f} nats): its own "
        f"probabilities are too {sure}, which greedy choice does not see"
    )
    if "bleu" in report:
        lines += ["", *_bleu(report)]
    return [*lines, "", f'--combine "{report["combine"]}"']


def _likelihoods(report: Mapping[str, Any]) -> list[str]:
    """Columns of nats a token and gains, twice with held-out text."""
    fit, kinds = _of_likelihood(report), ["", "held_out_"] if "held_out" in report else [""]
    rows = [["nats a token", "on the text", "gain of the fit"], ["fitted", f"{fit['nats']:.4f}", ""]]
    if "held_out" in report:
        rows[0] += ["held out", "gain of the fit"]
        held_out = report["held_out"]
        rows[1] += [f"{held_out.get('likeliest_nats', held_out['nats']):.4f}", ""]
    for row in report["against"]:
        cells = [row["expression"]]
        for kind in kinds:
            cells += [f"{row[f'{kind}nats']:.4f}", f"{row[f'{kind}gain']:.4f} ± {row[f'{kind}gain_error']:.4f}"]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}" for place, (cell, width) in columns).rstrip()
        for columns in (list(enumerate(zip(row, widths))) for row in rows)
    ]


def _of_likelihood(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of the convex fit, which one for BLEU has under another name."""
    return report["likelihood"] if "bleu" in report else report["fit"]


def _certificate(report: Mapping[str, Any]) -> list[str]:
    fit = _of_likelihood(report)
    lines = [
        f"{fit['texts']:,} texts, {fit['tokens']:,} tokens, {fit['steps']} Newton steps in {fit['seconds']:.1f} s: "
        f"gradient {fit['gradient_norm']:.1e}, smallest eigenvalue of the Hessian {fit['smallest_eigenvalue']:.4g}, "
        f"at most {fit['left_to_gain']:.1e} nats left to gain"
    ]
    if not fit["converged"]:
        lines.append("not converged: the gradient is not zero; look at the logits' scale, or give --l2 or --bounds")
    lines += [
        f"the Hessian is singular along {direction}: the text does not tell these apart, and along it the weights stay "
        "where --combine has them"
        for direction in fit["flat"]
    ]
    if "starts" in report:
        starts = report["starts"]
        lines.append(
            f"from {starts['count']} random starts: weights within {starts['largest_weight_difference']:.1e}, nats "
            f"within {starts['largest_nats_difference']:.1e}"
        )
    return lines


def _bleu(report: Mapping[str, Any]) -> list[str]:
    found = report["bleu"]
    rows = {
        report["fit"]["centre"]: found["bleu_of_centre"],
        "likeliest weights": found["bleu_of_likeliest"],
        "weights for BLEU": found["bleu"],
    }
    width = max(map(len, rows))
    return [
        f"BLEU of this text's translations, {found['beam']} beams",
        *(f"{name:{width}}  {score:.2f}" for name, score in rows.items()),
        f"{found['hypotheses']:,} hypotheses in {found['seconds']:.0f} s; the weights for BLEU have "
        f"{report['fit']['nats']:.4f} nats a token; {found['signature']}",
    ]


def curve_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each number of pairs."""
    if "curve" not in report:
        return []
    rows = report["curve"]
    lines = ["", f"nats a token on {rows[0]['held_out_texts']:,} other texts, fitted on the first"]
    for row in rows:
        weights = " ".join(f"{name} {weight:.3f}" for name, weight in row["weights"].items())
        lines.append(f"{row['texts']:7,}  {row['held_out_nats']:.4f}  {weights}")
    lines.append(f"      0  {rows[0]['held_out_start_nats']:.4f}  {report['fit']['centre']}")
    return lines
