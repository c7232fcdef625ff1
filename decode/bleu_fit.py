"""Weights fitted to BLEU itself, by a small search around the likeliest ones: the idea of MERT (Och, ACL 2003).

Rounds of: translate with the weights reached, keep the n-best lists; search the weights under which the best of each
list together have the highest BLEU; translate with those. The weights returned are those of the round whose real
translations had the highest BLEU, so never worse on this text than where the search began.

A list is ranked as beam search ranks it: log-probability over length, the end counted. MERT's score is linear in the
weights; ours, with its log Z at every place, is not. Each hypothesis is read once by all members, and its
log-probability is exact at the weights reached; around them the search uses its second-order expansion, whose terms are
the moments of teacher_forced.py, so a trial costs no model at all. It does not leave a ball around the weights reached;
a round whose translations are worse halves the ball.

BLEU is a step function of the weights: a line search looks at a grid of places, each taken with its neighbours, so
that a broad plateau is preferred to a narrow peak (Cer, Jurafsky and Manning, WMT 2008). Starts are random and seeded.

    S sentences  H hypotheses, padded to K a sentence  N members  C counts of BLEU
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from corpora.metrics import text_metrics
from corpora.pairs import one_line
from decode.engine.beam import Rules, search
from decode.engine.ensemble import Ensemble
from decode.model.packed_llama import PreparedLlama
from decode.pipeline.progress import DecodeProgress
from decode.fitting.hidden_states import Array, Likelihood, TeacherForced, teacher_forced
from decode.translate import Counters
from decode.fitting.fit import rounded
from minillama import Tokenizer

RADIUS = 0.3
STARTS = 10
GRID = 25
SWEEPS = 5
LEAST_RADIUS = 0.02


@dataclass(frozen=True)
class Task:
    """What is translated and by what it is judged. prompts: a list of tokens for each of the models, in their order."""

    models: Mapping[str, PreparedLlama]
    tokenizer: Tokenizer
    prompts: Sequence[tuple[list[int], ...]]
    references: Sequence[str]
    target: str
    beams: int
    max_new_tokens: int
    batch_size: int


@dataclass
class Lists:
    """N-best lists that grow: of each hypothesis its sentence, tokens and BLEU's counts; all read by every member."""

    task: Task
    data: TeacherForced
    sentence_H: list[int] = field(default_factory=list)
    counts_HC: list[list[int]] = field(default_factory=list)
    seen: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metric = text_metrics(["bleu"], self.task.references, self.task.target)[-1].metric

    def add(self, found: Sequence[Sequence[list[int]]], weights_N: Array) -> int:
        """Add the hypotheses of each sentence that are new; returns how many are."""
        new = [
            (sentence, tokens)
            for sentence, hypotheses in enumerate(found)
            for tokens in hypotheses
            if (sentence, tuple(tokens)) not in self.seen
        ]
        if not new:
            return 0
        task = self.task
        ensemble = Ensemble(task.models, dict.fromkeys(task.models, 1.0))
        prompts = [task.prompts[sentence] for sentence, _ in new]
        targets = [tokens for _, tokens in new]
        read = teacher_forced(ensemble, prompts, targets, task.batch_size, self.data.output, quiet=True)
        read, _ = read.with_end(weights_N)
        self.data = self.data.joined(read) if self.seen else read
        for sentence, tokens in new:
            score = self.metric.sentence_score(text_of(task, tokens), [task.references[sentence]])
            self.counts_HC.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
        self.sentence_H += [sentence for sentence, _ in new]
        self.seen |= {(sentence, tuple(tokens)) for sentence, tokens in new}
        return len(new)

    def around(self, weights_N: Array) -> "Expansion":
        return Expansion.of(self.data.likelihood(weights_N), self)


@dataclass(frozen=True)
class Expansion:
    """Scores of all hypotheses to second order around weights_N; rows without a hypothesis score -inf."""

    weights_N: Array
    value_SK: Array
    slope_SKN: Array
    bend_SKNN: Array
    counts_SKC: Array
    bleu_of: Callable[[Array], float]

    @classmethod
    def of(cls, likelihood: Likelihood, lists: Lists) -> "Expansion":
        length_H = np.bincount(lists.data.text_T.cpu().numpy(), minlength=lists.data.texts)
        sentence_H, sentences = np.array(lists.sentence_H), len(lists.task.references)
        place_H = np.zeros_like(sentence_H)
        for sentence in range(sentences):
            here_H = sentence_H == sentence
            place_H[here_H] = np.arange(here_H.sum())

        def padded(values_H: Array, empty: float = 0.0) -> Array:
            result = np.full((sentences, place_H.max() + 1, *values_H.shape[1:]), empty)
            result[sentence_H, place_H] = values_H
            return result

        return cls(
            likelihood.weights_N,
            padded(-likelihood.nats_S / length_H, -np.inf),
            padded(-likelihood.gradient_SN / length_H[:, None]),
            padded(-likelihood.hessian_SNN / length_H[:, None, None]),
            padded(np.array(lists.counts_HC, dtype=np.float64)),
            lambda counts_C: bleu(lists.metric, counts_C),
        )

    def along(self, base_N: Array, way_N: Array, lengths_G: Array) -> Array:
        """(G,) BLEU of the best of each list at base + length * way."""
        away_N = base_N - self.weights_N
        bent_SKN = self.bend_SKNN @ away_N
        constant_SK = self.value_SK + self.slope_SKN @ away_N + 0.5 * bent_SKN @ away_N
        linear_SK = (self.slope_SKN + bent_SKN) @ way_N
        square_SK = 0.5 * self.bend_SKNN @ way_N @ way_N
        rows_S, found = np.arange(len(constant_SK)), []
        for length in lengths_G:
            best_S = (constant_SK + length * linear_SK + length**2 * square_SK).argmax(axis=1)
            found.append(self.bleu_of(self.counts_SKC[rows_S, best_S].sum(axis=0)))
        return np.array(found)


def bleu(metric: Any, counts_C: Array) -> float:
    """Corpus BLEU of summed counts, by the metric's own settings."""
    counts = counts_C.astype(int).tolist()
    order = metric.max_ngram_order
    score = metric.compute_bleu(
        counts[2 : 2 + order],
        counts[2 + order :],
        *counts[:2],
        smooth_method=metric.smooth_method,
        smooth_value=metric.smooth_value,
        effective_order=False,
        max_ngram_order=order,
    )
    return float(score.score)


def text_of(task: Task, tokens: Sequence[int]) -> str:
    return one_line(task.tokenizer.decode(tokens)).strip()


def translated(task: Task, weights_N: Array) -> list[list[list[int]]]:
    """The n-best lists of all sentences, best first, by beam search under these weights."""
    weights = {name: float(weight) for name, weight in zip(task.models, weights_N) if weight}
    ensemble = Ensemble(task.models, weights)
    used = [number for number, name in enumerate(task.models) if name in weights]
    prompts = [tuple(prompt[number] for number in used) for prompt in task.prompts]
    rules = Rules(task.beams, 1.0, ensemble.stop_tokens)
    found: list[list[list[int]]] = [[] for _ in prompts]
    progress = DecodeProgress(len(prompts))
    try:
        for index, hypotheses in search(ensemble, prompts, task.max_new_tokens, task.batch_size, rules, Counters()):
            found[index] = [hypothesis.tokens for hypothesis in hypotheses]
            progress.add(len(found[index][0]) if found[index] else 0)
    finally:
        progress.stop()
    return found


def best_on_lists(expansion: Expansion, radius: float, generator: np.random.Generator) -> tuple[Array, float]:
    """Weights within `radius` (relative to those of the expansion) with the highest BLEU on the lists: line searches
    along the members' axes and random ways, from the middle and from random starts.
    """
    middle_N = expansion.weights_N
    count, reach = len(middle_N), radius * float(np.linalg.norm(middle_N))
    best_N, best = middle_N, smoothed(expansion.along(middle_N, middle_N, np.zeros(3)))[1]
    for start in range(STARTS):
        at_N = middle_N
        if start:
            way_N = generator.normal(size=count)
            at_N = middle_N + reach * generator.random() ** (1 / count) * way_N / np.linalg.norm(way_N)
        value = -np.inf
        for _ in range(SWEEPS):
            before = value
            ways = [*np.eye(count), *generator.normal(size=(count, count))]
            for way_N in ways:
                lengths_G = np.linspace(*_chord(at_N - middle_N, way_N, reach), GRID)
                found_G = smoothed(expansion.along(at_N, way_N, lengths_G))
                # of equal places the one nearest to where the line search began
                place = int(np.lexsort((np.abs(lengths_G), -found_G))[0])
                if found_G[place] > value:
                    at_N, value = at_N + lengths_G[place] * way_N, float(found_G[place])
            if value <= before + 1e-9:
                break
        if value > best:
            best_N, best = at_N, value
    return best_N, best


def _chord(from_N: Array, way_N: Array, reach: float) -> tuple[float, float]:
    """Lengths at which a line from inside a ball around zero leaves it."""
    a, b, c = way_N @ way_N, from_N @ way_N, from_N @ from_N - reach**2
    root = max(float(b * b - a * c), 0.0) ** 0.5
    return float((-b - root) / a), float((-b + root) / a)


def smoothed(values_G: Array) -> Array:
    """Each place with half of both neighbours; an end is its own neighbour."""
    padded = np.pad(values_G, 1, mode="edge")
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]


def fit_bleu(
    task: Task,
    data: TeacherForced,
    likeliest_N: Array,
    centre_N: Array,
    rounds: int,
    seed: int,
    tell: Callable[[str], None],
) -> tuple[Array, dict[str, Any]]:
    """Weights, and a report: BLEU of the translations of this text by each round's weights.

    data: the references as the members read them, for the output layers. The lists begin with the translations by the
    likeliest weights and by those of --combine.
    """
    generator = np.random.default_rng(seed)
    lists = Lists(task, data)
    rows: list[dict[str, Any]] = []

    def round_of(weights_N: Array) -> float:
        weights_N = np.array([rounded(weight) for weight in weights_N])
        found = translated(task, weights_N)
        texts = [text_of(task, hypotheses[0]) if hypotheses else "" for hypotheses in found]
        score = float(lists.metric.corpus_score(texts, None).score)
        new = lists.add(found, likeliest_N)
        rows.append({"weights": dict(zip(task.models, map(float, weights_N))), "bleu": score, "new_hypotheses": new})
        tell(f"round {len(rows) - 1}: BLEU {score:.2f}, {new:,} new hypotheses, {len(lists.seen):,} in all")
        return score

    start = round_of(centre_N)
    best_N, best, radius = likeliest_N, round_of(likeliest_N), RADIUS
    likeliest = best
    expansion = lists.around(best_N)
    for _ in range(rounds):
        trial_N, promised = best_on_lists(expansion, radius, generator)
        tell(f"on the lists BLEU {promised:.2f}")
        score = round_of(trial_N)
        if score > best:
            best_N, best = np.array([rounded(weight) for weight in trial_N]), score
        else:
            radius /= 2
        if radius < LEAST_RADIUS:
            break
        expansion = lists.around(best_N)
    report = {
        "bleu": best,
        "bleu_of_likeliest": likeliest,
        "bleu_of_centre": start,
        "signature": lists.metric.get_signature().format(),
        "beam": task.beams,
        "hypotheses": len(lists.seen),
        "seed": seed,
        "rounds": rows,
    }
    return best_N, report
