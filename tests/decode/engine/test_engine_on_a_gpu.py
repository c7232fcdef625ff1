"""The engine on a GPU against the engine on the CPU, and graphs against the step they replay: `pytest -m gpu`."""

import pytest
import torch
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence

pytestmark = pytest.mark.gpu

EXPRESSION = "L + 0.5*S - 0.25*A"
GREEDY, SAMPLED, TRUNCATED = SamplingParams(), SamplingParams(0.7, seed=3), SamplingParams(0.7, 20, 0.9, 3)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, TINY.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def models_of(device, dtype=torch.float32, **fields):
    return {name: tiny_model(seed, **fields).to(device, dtype) for seed, name in enumerate("LSA")}


def mixed():
    """Sequences with parameters, weights and lengths of their own."""
    kinds = [
        {},
        {"params": TRUNCATED},
        {"weights": (1.0, 0.0, 0.0)},
        {"params": SAMPLED, "weights": (0.0, 1.0, -0.5)},
        {"params": SamplingParams(beams=3), "max_new_tokens": 6},
        {"targets": [5, 6, 7]},
        {"top_logprobs": 3},
        {"params": SamplingParams(1.2, 5, seed=-1), "stop_tokens": frozenset(range(2, 30))},
    ]
    prompts = prompts_of(3, 17, 9, 30, 1, 12, 40, 5)
    return [
        Sequence((prompt,) * 3, **{"max_new_tokens": 20, "key": key} | kind)
        for key, (prompt, kind) in enumerate(zip(prompts, kinds))
    ]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("speculate", ["off", 3])
def test_a_gpu_chooses_the_tokens_that_the_cpu_chooses(invariant, speculate):
    prompts = prompts_of(3, 17, 9, 30, 1)
    expected = translate(Ensemble(models_of("cpu"), EXPRESSION), prompts, 20, batch_size=3)
    ensemble = Ensemble(models_of("cuda"), EXPRESSION, invariant=invariant)
    result = translate(ensemble, prompts, 20, batch_size=3, speculate=speculate)
    assert result.tokens == expected.tokens
    for ours, theirs in zip(result.logprobs, expected.logprobs):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("invariant", [False, True])
def test_sequences_of_every_kind_give_what_they_give_on_the_cpu_and_under_invariant_alone(invariant):
    expected = dict(Engine(Ensemble(models_of("cpu"), EXPRESSION), 5, 64).generate(mixed()))
    ensemble = Ensemble(models_of("cuda"), EXPRESSION, invariant=invariant)
    found = dict(Engine(ensemble, 5, 64).generate(mixed()))
    for number, sequence in enumerate(mixed()):
        assert found[number].tokens == expected[number].tokens
        assert found[number].finish_reason == expected[number].finish_reason
        assert found[number].logprobs == pytest.approx(expected[number].logprobs, abs=1e-3)
        if invariant:
            ((_, alone),) = Engine(ensemble, sequence.params.beams, 64).generate([sequence])
            assert (found[number].tokens, found[number].logprobs) == (alone.tokens, alone.logprobs)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, TRUNCATED])
@pytest.mark.parametrize("invariant", [False, True])
def test_graphs_choose_what_the_eager_step_chooses(invariant, params):
    prompts = prompts_of(3, 17, 9, 30, 1, 12, 40, 5)
    models = models_of("cuda")
    eager = translate(Ensemble(models, EXPRESSION, invariant=invariant, graphs=False), prompts, 50, 5, params=params)
    engine = Engine(Ensemble(models, EXPRESSION, invariant=invariant), 5, 96)
    for _ in range(2):  # the second time with the graphs of the first
        sequences = [Sequence((prompt,) * 3, params, 50, key=key) for key, prompt in enumerate(prompts)]
        found = dict(engine.generate(sequences))
        assert [found[key].tokens for key in range(8)] == eager.tokens
        assert [found[key].finish_reason for key in range(8)] == eager.finished
        for key, theirs in enumerate(eager.logprobs):
            assert found[key].logprobs == (theirs if invariant else pytest.approx(theirs, abs=1e-4))
    buffers = engine.runner.graphs.buffers
    assert all(held.graph is not None for held in buffers.values())
    assert {shape.slots for shape in buffers} <= {1, 2, 4, 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_step_has_the_logits_of_the_step_itself(dtype):
    """A graph against the function that it recorded, with slots that are released and filled between steps."""
    ensemble = Ensemble(models_of("cuda", dtype, max_position_embeddings=200), EXPRESSION)
    engines = [Engine(ensemble, 4, 200), Engine(ensemble, 4, 200)]
    engines[1].runner.graphs._capture = lambda shape, buffers: None
    prompts = prompts_of(20, 53, 3, 97, 31)
    for engine in engines:
        for key, prompt in enumerate(prompts):
            engine.add(Sequence((prompt,) * 3, SamplingParams(0.9, seed=1), 9 + 4 * key, frozenset(), key=key))
    while engines[0].has_work:
        replayed, itself = (engine.step() for engine in engines)
        assert [update.tokens for update in replayed] == [update.tokens for update in itself]
        for ours, theirs in zip(replayed, itself):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        for ours, theirs in zip(*(engine.runner.graphs.logits for engine in engines)):
            torch.testing.assert_close(ours, theirs)


def test_a_replayed_step_allocates_no_memory_and_does_not_wait():
    engine = Engine(Ensemble(models_of("cuda"), EXPRESSION), 2, 64)
    engine.add(Sequence(([5],) * 3, max_new_tokens=9, stop_tokens=frozenset()))
    engine.step()
    engine.step()
    (buffers,) = engine.runner.graphs.buffers.values()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            buffers.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
