"""The paired bootstrap: does the score of a system differ from another's by more than chance?

For BLEU, chrF and TER it is sacrebleu's own; for means over sentences (BERTScore) the same formula with the same
resamples.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from corpora.metrics import TextMetric

SAMPLES = 1000
SEED = 12345  # sacrebleu's own default


@dataclass(frozen=True)
class Comparison:
    """One metric: the score of each system, its signature, and each other system's p-value against the first."""

    scores: list[float]
    signature: str
    p_values: list[float]


def compare_scores(metric: TextMetric, systems: Sequence[Sequence[str]], samples: int, seed: int) -> Comparison:
    """Scores of all systems; with more than one, sacrebleu's paired bootstrap of each against the first.

    The test statistic is the absolute difference, so it does not matter which of two systems is called the baseline.
    A system that equals the first line by line has a p-value of 1.
    """
    first, *others = map(list, systems)
    if not others:
        result = metric.metric.corpus_score(first, None)
        return Comparison([float(result.score)], metric.metric.get_signature().format(), [])
    from sacrebleu.significance import PairedTest

    named: list[tuple[str, Sequence[str]]] = [(str(number), system) for number, system in enumerate([first, *others])]
    with _sacrebleu_seed(seed):
        test = PairedTest(named, {metric.label: metric.metric}, None, test_type="bs", n_samples=samples)
    signatures, results = test()
    (name,) = signatures
    rows: list[Any] = results[name]
    # Of a system against itself sacrebleu's p is 1 / (samples + 1), its least, since no resample differs.
    p_values = [1.0 if other == first else float(row.p_value) for other, row in zip(others, rows[1:])]
    return Comparison([float(row.score) for row in rows], signatures[name].format(), p_values)


def compare_means(systems: Sequence[Sequence[float]], samples: int, seed: int) -> list[float]:
    """p-values of each system against the first, for a score that is a mean over sentences.

    Formula and resamples are those of sacrebleu.significance (Koehn 2004, with the shift to the mean difference).
    """
    import numpy as np

    scores_NS = np.asarray(systems, dtype=np.float64)
    sentences = scores_NS.shape[1]
    indices = np.random.default_rng(seed).choice(sentences, size=(samples, sentences), replace=True)
    means_NR = scores_NS[:, indices].mean(axis=-1)
    p_values = []
    for number in range(1, len(systems)):
        real = abs(scores_NS[number].mean() - scores_NS[0].mean())
        differences = np.abs(means_NR[number] - means_NR[0])
        above = int(np.sum(differences - differences.mean() > real))
        p_values.append((above + 1) / (samples + 1) if differences.any() else 1.0)
    return p_values


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """sacrebleu reads its seed only from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
