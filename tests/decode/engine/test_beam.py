"""Beam search against transformers' `generate(num_beams=4)` and exhaustive enumeration."""

import itertools
import math

import pytest
import torch
from tiny import in_transformers, random_prompts, tiny_model
from transformers import AutoModelForCausalLM

from corpora import sample
from decode import Ensemble, translate
from decode.demo import FOLDER
from decode.engine.generate import beam_search
from decode.pipeline.members import open_members
from minillama import InputError, Llama, Tokenizer

PAIRS = sample()


def generated(reference, prompt, stops, beams, new_tokens, penalty):
    """transformers' n-best list as (tokens without the stop token, score, whether it stopped)."""
    options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": new_tokens, "do_sample": False}
    options |= {"length_penalty": penalty, "return_dict_in_generate": True, "output_scores": True}
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    ends = {"eos_token_id": sorted(stops), "pad_token_id": min(stops)}
    found = reference.generate(torch.tensor([prompt]), attention_mask=mask, **options, **ends)
    entries = []
    for sequence, score in zip(found.sequences.tolist(), found.sequences_scores.tolist()):
        new = sequence[len(prompt) :]
        end = next((at for at, token in enumerate(new) if token in stops), None)
        entries.append((new[:end], score, end is not None))
    return entries


def compare(model, reference, prompts, beams, new_tokens, penalty, batch_size):
    """Assert equal n-best lists; returns the largest difference of scores and how many hypotheses stopped."""
    stops = Ensemble({"L": model}).stop_tokens
    ours = beam_search(Ensemble({"L": model}), prompts, beams, new_tokens, penalty, batch_size)
    largest, stopped = 0.0, 0
    for prompt, hypotheses in zip(prompts, ours):
        expected = generated(reference, prompt, stops, beams, new_tokens, penalty)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _, _ in expected]
        for hypothesis, (_, score, ends) in zip(hypotheses, expected):
            assert (hypothesis.finish_reason == "stop") == ends
            length = len(hypothesis.tokens) + ends
            assert len(hypothesis.logprobs) == length
            assert hypothesis.score == pytest.approx(math.fsum(hypothesis.logprobs) / length**penalty, abs=1e-9)
            largest = max(largest, abs(hypothesis.score - score))
            stopped += ends
    return largest, stopped


@pytest.mark.parametrize(
    ("beams", "stops", "penalty"),
    [(4, 1, 1.0), (4, 7, 0.6), (4, 3, 2.0), (4, 7, 0.0), (4, 7, -0.5), (2, 2, 1.0), (8, 2, 1.0)],
)
def test_nbest_lists_and_scores_are_those_of_transformers(tmp_path, beams, stops, penalty):
    # With a head of its own and little noise in it, stop tokens come often enough to end searches early.
    model = tiny_model(stops, eos_token_id=tuple(range(1, 1 + stops)))
    reference = in_transformers(model, tmp_path / "model", torch.float32)
    largest, _ = compare(model, reference, random_prompts(stops, 4), beams, 10, penalty, batch_size=12)
    assert largest < 1e-4


def test_early_stopping_is_that_of_transformers_where_most_hypotheses_stop(tmp_path):
    """Twenty prompts over forty tokens, three of which stop: many lists are full long before the limit."""
    model = tiny_model(6, vocab_size=40, eos_token_id=(1, 2, 3))
    reference = in_transformers(model, tmp_path / "model", torch.float32)
    largest, stopped = compare(model, reference, random_prompts(6, 20, vocabulary=40), 4, 20, 1.0, batch_size=40)
    assert largest < 1e-4
    assert stopped > 40


def test_one_beam_is_greedy():
    ensemble = Ensemble({"L": tiny_model(7, eos_token_id=(1, 2))})
    greedy = translate(ensemble, random_prompts(7, 6), 10)
    assert [found[0].tokens for found in beam_search(ensemble, random_prompts(7, 6), 1, 10)] == greedy.tokens


@torch.no_grad()
def test_an_ensembles_list_is_that_of_an_enumeration(tmp_path):
    """Eight beams over six tokens lose nothing in two steps: the list is that of an enumeration in float64."""
    models = {name: tiny_model(seed, vocab_size=6) for seed, name in enumerate("LS")}
    prompts = {"L": random_prompts(8, 5, vocabulary=6), "S": random_prompts(9, 5, vocabulary=6)}
    references = {name: in_transformers(model, tmp_path / name) for name, model in models.items()}
    found = beam_search(Ensemble(models, "L - 0.5*S"), prompts, 8, 2, 0.7, batch_size=16)
    for number, hypotheses in enumerate(found):

        def logprobs(tokens, number=number):
            read = {name: torch.tensor([[*prompts[name][number], *tokens]]) for name in models}
            l_V, s_V = (references[name](read[name]).logits[0, -1] for name in models)
            return (l_V - 0.5 * s_V).log_softmax(-1)

        first = logprobs([])
        every = [(float(first[1]), [])]
        for token in (0, 2, 3, 4, 5):
            second = logprobs([token])
            both = [(float(first[token] + second[other]) / 2**0.7, token, other) for other in range(6)]
            every += [(score, [token] if other == 1 else [token, other]) for score, token, other in both]
        every.sort(reverse=True)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for _, tokens in every[:8]]
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([s for s, _ in every[:8]], abs=1e-5)


def test_a_list_has_the_same_bits_alone_and_in_any_batch():
    models = {name: tiny_model(seed, eos_token_id=(1, 2, 3)) for seed, name in enumerate("LS")}
    ensemble = Ensemble(models, "L + 0.5*S")
    prompts = random_prompts(10, 5)
    alone = [beam_search(ensemble, [prompt], 3, 12)[0] for prompt in prompts]
    for batch_size, order in itertools.product((1, 7, 15), (range(5), range(4, -1, -1))):
        found = beam_search(ensemble, [prompts[i] for i in order], 3, 12, batch_size=batch_size)
        assert found == [alone[i] for i in order]


def test_numbers_out_of_range_are_refused():
    many_stops = Ensemble({"L": tiny_model(0, eos_token_id=tuple(range(1, 31)))})
    for beams, named in ((0, "0 beams"), (9, "9 beams"), (3, "30 stop tokens")):
        with pytest.raises(InputError, match=named):
            beam_search(many_stops, [[5]], beams)
    ensemble = Ensemble({"L": tiny_model(0)})
    with pytest.raises(InputError, match="nbest 5"):
        beam_search(ensemble, [[5]], 4, nbest=5)
    with pytest.raises(InputError, match="prompt 2 is empty"):
        beam_search(ensemble, [[5], []], 4)
    assert beam_search(ensemble, [], 4) == []


def of_the_demo(request):
    member = open_members({"L": str(FOLDER / "L")}, None, None)[0]
    prompts = [member.encode(sentence, "ja", "en") for sentence in PAIRS.source]
    return FOLDER / "L", prompts + [member.encode(sentence, "en", "ja") for sentence in PAIRS.target[:10]]


def of_smollm2(request):
    folder, _ = request.getfixturevalue("smollm2")
    tokenizer = Tokenizer.from_pretrained(folder)
    return folder, [tokenizer.encode(sentence) for sentence in [*PAIRS.target, *PAIRS.source][:50]]


@pytest.mark.slow
@pytest.mark.parametrize("real", [of_the_demo, of_smollm2])
def test_real_models_on_fifty_prompts(request, real):
    """Four beams, 32 tokens; with `-s` the figures."""
    folder, prompts = real(request)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    largest, stopped = compare(model, reference, prompts, 4, 32, 1.0, batch_size=32)
    print(f"\n{real.__name__}: 200 hypotheses equal, {stopped} with an end; largest score difference {largest:.2e}")
    assert largest < 1e-4
