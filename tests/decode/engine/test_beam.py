"""Beam search against transformers' `generate(num_beams=4)` and exhaustive enumeration."""

import itertools
import math

import pytest
import torch
from tiny import TINY, tiny_model

from corpora import sample
from decode import Ensemble, translate
from decode.engine.generate import beam_search
from minillama import InputError, Llama, Tokenizer

PAIRS = sample()


def in_transformers(model, folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def prompts_of(seed, count, shortest=1, longest=24, vocabulary=TINY.vocab_size):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def generated(reference, prompt, stops, beams, new_tokens, penalty):
    """transformers' n-best list as (tokens without the stop token, score, whether it stopped)."""
    found = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=new_tokens,
        length_penalty=penalty,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=sorted(stops)[0],
        return_dict_in_generate=True,
        output_scores=True,
    )
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
            assert len(hypothesis.logprobs) == len(hypothesis.tokens) + ends
            largest = max(largest, abs(hypothesis.score - score))
            stopped += ends
    return largest, stopped


@pytest.mark.parametrize(
    ("seed", "stops", "penalty"), [(0, 1, 1.0), (1, 3, 1.0), (2, 7, 0.6), (3, 3, 2.0), (4, 7, 0.0), (5, 7, -0.5)]
)
def test_nbest_lists_and_scores_are_those_of_transformers(tmp_path, seed, stops, penalty):
    # With a head of its own and little noise in it, stop tokens come often enough to end searches early.
    model = tiny_model(seed, eos_token_id=tuple(range(1, 1 + stops)))
    reference = in_transformers(model, tmp_path / "model")
    largest, _ = compare(model, reference, prompts_of(seed, 6), 4, 12, penalty, batch_size=12)
    assert largest < 1e-4


def test_early_stopping_is_that_of_transformers_where_most_hypotheses_stop(tmp_path):
    """Thirty prompts over forty tokens, three of which stop: many lists are full long before the limit."""
    model = tiny_model(6, vocab_size=40, eos_token_id=(1, 2, 3))
    reference = in_transformers(model, tmp_path / "model")
    prompts = prompts_of(6, 30, vocabulary=40)
    largest, stopped = compare(model, reference, prompts, 4, 20, 1.0, batch_size=40)
    assert largest < 1e-4
    assert stopped > 60


@pytest.mark.parametrize("beams", [1, 2, 8])
def test_other_numbers_of_beams(tmp_path, beams):
    model = tiny_model(7, eos_token_id=(1, 2))
    reference = in_transformers(model, tmp_path / "model")
    if beams > 1:
        assert compare(model, reference, prompts_of(7, 6), beams, 10, 1.0, batch_size=16)[0] < 1e-4
    else:
        greedy = translate(Ensemble({"L": model}), prompts_of(7, 6), 10)
        assert [found[0].tokens for found in beam_search(Ensemble({"L": model}), prompts_of(7, 6), 1, 10)] == (
            greedy.tokens
        )


@torch.no_grad()
def test_an_ensembles_list_is_that_of_an_enumeration(tmp_path):
    """Eight beams over six tokens lose nothing in two steps: the list is that of an enumeration in float64."""
    models = {name: tiny_model(seed, vocab_size=6) for seed, name in enumerate("LS")}
    prompts = {"L": prompts_of(8, 5, vocabulary=6), "S": prompts_of(9, 5, vocabulary=6)}
    references = {name: in_transformers(model, tmp_path / name, torch.float64) for name, model in models.items()}
    found = beam_search(Ensemble(models, "L - 0.5*S"), prompts, 8, 2, 0.7, batch_size=16)
    for number, hypotheses in enumerate(found):

        def logprobs(tokens, number=number):
            own = {
                name: references[name](torch.tensor([[*prompts[name][number], *tokens]])).logits[0, -1]
                for name in models
            }
            return (own["L"] - 0.5 * own["S"]).log_softmax(-1)

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
    prompts = prompts_of(10, 9)
    alone = [beam_search(ensemble, [prompt], 3, 12)[0] for prompt in prompts]
    for batch_size, order in itertools.product((1, 7, 30), (range(9), range(8, -1, -1))):
        found = beam_search(ensemble, [prompts[i] for i in order], 3, 12, batch_size=batch_size)
        assert found == [alone[i] for i in order]


def test_a_score_is_the_sum_of_the_log_probabilities_over_the_length_with_the_end():
    model = tiny_model(11, vocab_size=40, eos_token_id=(1, 2, 3))
    for penalty in (0.0, 1.0, 1.5):
        for hypotheses in beam_search(Ensemble({"L": model}), prompts_of(11, 4, vocabulary=40), 4, 8, penalty):
            for found in hypotheses:
                length = len(found.tokens) + (found.finish_reason == "stop")
                assert found.score == pytest.approx(math.fsum(found.logprobs) / length**penalty, abs=1e-9)


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


@pytest.mark.slow
def test_the_demos_model_on_fifty_prompts():
    from decode.demo import FOLDER
    from decode.pipeline.members import open_members

    member = open_members({"L": str(FOLDER / "L")}, None, None)[0]
    prompts = [member.encode(sentence, "ja", "en") for sentence in PAIRS.source]
    prompts += [member.encode(sentence, "en", "ja") for sentence in PAIRS.target[: 50 - len(prompts)]]
    compare_real(FOLDER / "L", prompts, "the demo's L")


@pytest.mark.slow
def test_smollm2_on_fifty_prompts(smollm2):
    folder, _ = smollm2
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(sentence) for sentence in [*PAIRS.target, *PAIRS.source][:50]]
    compare_real(folder, prompts, "SmolLM2")


def compare_real(folder, prompts, name):
    """Four beams, 32 tokens; with `-s` the figures."""
    from transformers import AutoModelForCausalLM

    assert len(prompts) == 50
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest, stopped = compare(model, reference, prompts, 4, 32, 1.0, batch_size=32)
    print(f"\n{name}: 50 prompts, 200 hypotheses equal, {stopped} with an end; largest score difference {largest:.2e}")
    assert largest < 1e-4
