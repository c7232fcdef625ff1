"""Weights for BLEU: expansions against exact scores, counts against sacrebleu, the search against a dense grid."""

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from tiny import TINY, tiny_model

from decode import Ensemble
from decode.engine.beam import beam_search
from decode.bleu_fit import Expansion, Lists, Task, _chord, best_on_lists, bleu, fit_bleu, smoothed, text_of
from decode.model.packed_llama import PreparedLlama
from decode.fitting.hidden_states import teacher_forced
from minillama import Tokenizer

TRUE = {"A": 0.8, "B": 0.5, "C": -0.3}
SENTENCES = 30


@pytest.fixture(scope="module")
def task(tokenizer_folder):
    """References are what a known combination writes, so that some weights are better than others."""
    models = {name: PreparedLlama(tiny_model(seed)) for seed, name in enumerate(TRUE)}
    generator = torch.Generator().manual_seed(3)
    prompts = [
        (torch.randint(2, TINY.vocab_size, (length,), generator=generator).tolist(),) * 3
        for length in torch.randint(2, 9, (SENTENCES,), generator=generator).tolist()
    ]
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    found = beam_search(Ensemble(models, TRUE), [prompt[0] for prompt in prompts], beams=3, max_new_tokens=12)
    task = Task(models, tokenizer, prompts, [], "en", 3, 12, 16)
    references = [text_of(task, hypotheses[0].tokens) for hypotheses in found]
    return Task(models, tokenizer, prompts, references, "en", 3, 12, 16)


@pytest.fixture(scope="module")
def data(task):
    targets = [task.tokenizer.encode(text) for text in task.references]
    return teacher_forced(Ensemble(task.models), task.prompts, targets)


def lists_of(task, data, seed=0):
    """Lists of random texts of unequal lengths, one sentence with a single one."""
    generator = torch.Generator().manual_seed(seed)
    lists = Lists(task, data)
    found = [
        [torch.randint(2, TINY.vocab_size, (3 + k,), generator=generator).tolist() for k in range(1 + sentence % 4)]
        for sentence in range(SENTENCES)
    ]
    assert lists.add(found, np.ones(3)) == sum(map(len, found))
    assert lists.add(found, np.ones(3)) == 0
    return lists, found


def exact(lists, weights_N, found):
    """Log-probability over length of every hypothesis, a row a sentence."""
    length_H = np.bincount(lists.data.text_T.numpy())
    values = iter(-lists.data.nats(weights_N) / length_H)
    return [[next(values) for _ in hypotheses] for hypotheses in found]


def test_scores_are_exact_in_the_middle_and_to_second_order_around_it(task, data):
    lists, found = lists_of(task, data)
    middle_N, way_N = np.array([0.6, 0.4, -0.1]), np.array([0.5, -0.3, 0.4])
    expansion = lists.around(middle_N)
    errors = []
    for length in (0.0, 0.1, 0.2):
        away_N = length * way_N
        score_SK = (
            expansion.value_SK
            + expansion.slope_SKN @ away_N
            + 0.5 * np.einsum("sknm,n,m->sk", expansion.bend_SKNN, away_N, away_N)
        )
        differences = [
            abs(score_SK[sentence, k] - value)
            for sentence, row in enumerate(exact(lists, middle_N + away_N, found))
            for k, value in enumerate(row)
        ]
        errors.append(max(differences))
        assert np.isinf(score_SK[0, 1:]).all()
    assert errors[0] < 1e-5
    assert errors[2] < 0.05
    assert errors[1] < errors[2] / 4


def test_bleu_along_a_line_is_sacrebleus_of_the_best_texts_there(task, data):
    lists, found = lists_of(task, data)
    middle_N = np.array([0.6, 0.4, -0.1])
    lengths_G = np.array([-0.01, 0.0, 0.01])
    along_G = lists.around(middle_N).along(middle_N, np.ones(3), lengths_G)
    for length, value in zip(lengths_G, along_G):
        scores = exact(lists, middle_N + length, found)
        texts = [text_of(task, hypotheses[int(np.argmax(row))]) for hypotheses, row in zip(found, scores)]
        assert value == pytest.approx(BLEU().corpus_score(texts, [task.references]).score, abs=1e-9)


def test_summed_counts_are_corpus_bleu(task):
    metric = Lists(task, None).metric
    texts = [reference[: 4 + 3 * number] for number, reference in enumerate(task.references)]
    counts = []
    for text, reference in zip(texts, task.references):
        score = metric.sentence_score(text, [reference])
        counts.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    expected = BLEU().corpus_score(texts, [task.references]).score
    assert bleu(metric, np.array(counts, dtype=float).sum(axis=0)) == pytest.approx(expected)


def test_a_chord_ends_on_the_ball():
    generator = np.random.default_rng(0)
    for count in (1, 2, 5):
        way_N, from_N = generator.normal(size=(2, count))
        from_N *= 0.5 / np.linalg.norm(from_N)
        ends = _chord(from_N, way_N, 0.7)
        assert ends[0] < 0 < ends[1]
        assert [np.linalg.norm(from_N + end * way_N) for end in ends] == pytest.approx([0.7, 0.7])


def synthetic(seed, sentences=40, hypotheses=5, members=2):
    """Hypotheses with random slopes and counts in which the second count is the quality."""
    generator = np.random.default_rng(seed)
    slope_SKN = generator.normal(size=(sentences, hypotheses, members))
    counts_SKC = generator.integers(0, 100, (sentences, hypotheses, 1)).astype(float)
    value_SK, bend = slope_SKN @ np.ones(members), np.zeros((sentences, hypotheses, members, members))
    return Expansion(np.ones(members), value_SK, slope_SKN, bend, counts_SKC, lambda counts_C: float(counts_C[0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_what_a_dense_grid_finds(seed):
    expansion, radius = synthetic(seed), 0.5
    found_N, value = best_on_lists(expansion, radius, np.random.default_rng(0))
    reach = radius * 2**0.5
    assert np.linalg.norm(found_N - 1) <= reach * (1 + 1e-9)
    grid = np.linspace(-reach, reach, 61)
    inside = [np.array([x, y]) for x in grid for y in grid if np.hypot(x, y) <= reach]
    every = [expansion.along(np.ones(2) + away_N, away_N, np.zeros(1))[0] for away_N in inside]
    middle = expansion.along(np.ones(2), np.ones(2), np.zeros(1))[0]
    assert value >= middle
    assert value >= middle + 0.85 * (max(every) - middle)
    again_N, _ = best_on_lists(expansion, radius, np.random.default_rng(0))
    assert (again_N == found_N).all()


def test_smoothing_keeps_a_constant_and_lowers_a_peak():
    assert smoothed(np.full(5, 3.0)) == pytest.approx([3.0] * 5)
    assert smoothed(np.array([0.0, 0.0, 4.0, 0.0, 0.0])) == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


def test_weights_for_bleu_are_never_worse_on_their_text_and_repeat(task, data, monkeypatch):
    monkeypatch.setattr("decode.bleu_fit.STARTS", 3)
    start_N, plain_N = np.array([0.4, 0.4, 0.2]), np.ones(3)
    told = []
    weights_N, report = fit_bleu(task, data, start_N, plain_N, 3, 0, told.append)
    rounds = [row["bleu"] for row in report["rounds"]]
    assert report["bleu_of_centre"] == rounds[0]
    assert report["bleu_of_likeliest"] == rounds[1]
    assert report["bleu"] == max(rounds[1:])
    assert report["bleu"] > report["bleu_of_likeliest"]
    found = beam_search(
        Ensemble(task.models, dict(zip(TRUE, weights_N))), [prompt[0] for prompt in task.prompts], 3, 12
    )
    texts = [text_of(task, hypotheses[0].tokens) for hypotheses in found]
    assert report["bleu"] == pytest.approx(BLEU().corpus_score(texts, [task.references]).score)
    again_N, report_again = fit_bleu(task, data, start_N, plain_N, 3, 0, told.append)
    assert (again_N == weights_N).all()
    assert report_again == report
