"""BLEU and chrF of sacrebleu, each with the signature that repeats it, and the paired bootstrap.

Every language has BLEU with sacrebleu's default tokenizer `13a`, and those written without spaces also with their own:
`ja-mecab`, `zh`, `ko-mecab`. The two are different numbers, never to be compared with each other.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minillama.errors import InputError

SAMPLES = 1000
SEED = 12345  # sacrebleu's own default
OWN_TOKENIZERS = {"ja": "ja-mecab", "zh": "zh", "ko": "ko-mecab"}
OPTIONAL_TOKENIZERS = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}


@dataclass(frozen=True)
class TextMetric:
    """One sacrebleu metric with its references inside. `key` names it in reports, `label` in tables."""

    key: str
    label: str
    metric: Any


@dataclass(frozen=True)
class Comparison:
    """One metric: the score of each system, its signature, and each other system's p-value against the first."""

    scores: list[float]
    signature: str
    p_values: list[float]


def bleu_tokenizers(target: str | None) -> list[str]:
    """The tokenizers BLEU is reported with for a target language, `13a` first."""
    own = OWN_TOKENIZERS.get((target or "").lower().replace("_", "-").split("-")[0])
    if own is None:
        return ["13a"]
    module = OPTIONAL_TOKENIZERS.get(own)
    if module and importlib.util.find_spec(module) is None:
        if own == "ko-mecab":  # an extra of sacrebleu that is not among what we require
            return ["13a"]
        raise InputError(f"BLEU with {own} needs MeCab: pip install 'sacrebleu[ja]'")
    return ["13a", own]


def text_metrics(names: Sequence[str], references: Sequence[str], target: str | None) -> list[TextMetric]:
    """Those of `bleu`, `chrf`, `chrf++`, `ter` among the names, in the names' order; BLEU once for each tokenizer."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    found: list[TextMetric] = []
    stream = [list(references)]
    for name in names:
        if name == "bleu":
            for tokenizer in bleu_tokenizers(target):
                key = "bleu" if tokenizer == "13a" else f"bleu_{tokenizer.replace('-', '_')}"
                metric = BLEU(tokenize=tokenizer, references=stream)
                found.append(TextMetric(key, f"BLEU {tokenizer}", metric))
        elif name == "chrf":
            found.append(TextMetric("chrf", "chrF2", CHRF(references=stream)))
        elif name == "chrf++":
            found.append(TextMetric("chrf++", "chrF2++", CHRF(word_order=2, references=stream)))
        elif name == "ter":
            found.append(TextMetric("ter", "TER", TER(references=stream)))
    return found


def compare(metric: TextMetric, systems: Sequence[Sequence[str]], samples: int, seed: int) -> Comparison:
    """Scores of all systems; with more than one, sacrebleu's paired bootstrap of each against the first.

    The test statistic is the absolute difference, so it does not matter which of two systems is called the baseline.
    A system that equals the first line by line has a p-value of 1.
    """
    if len(systems) == 1:
        result = metric.metric.corpus_score(list(systems[0]), None)
        return Comparison([result.score], metric.metric.get_signature().format(), [])
    from sacrebleu.significance import PairedTest

    named: list[tuple[str, Sequence[str]]] = [(str(number), list(system)) for number, system in enumerate(systems)]
    with _sacrebleu_seed(seed):
        test = PairedTest(named, {metric.label: metric.metric}, None, test_type="bs", n_samples=samples)
    signatures, results = test()
    (name,) = signatures
    rows: list[Any] = results[name]
    # sacrebleu's p of a system against itself is the least there is, 1 / (samples + 1), since no resample differs.
    p_values = [1.0 if system == list(systems[0]) else row.p_value for (_, system), row in zip(named[1:], rows[1:])]
    return Comparison([row.score for row in rows], signatures[name].format(), p_values)


def compare_means(systems: Sequence[Sequence[float]], samples: int, seed: int) -> list[float]:
    """The same paired bootstrap for a score that is a mean over sentences: p-values of each system against the first.

    Formula and resamples are those of sacrebleu.significance (Koehn 2004, with the shift to the mean difference).
    """
    import numpy as np

    if len(systems) == 1:
        return []
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
    """sacrebleu takes its seed from the environment and nowhere else."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
