"""The engine on a GPU against the engine on the CPU, and graphs against the step they replay: `pytest -m gpu`."""

import pytest
import torch
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from decode.draws import Draws
from decode.engine.kv_slots import Rows
from decode.engine.cuda_graph import StepGraphs

pytestmark = pytest.mark.gpu

EXPRESSION = "L + 0.5*S - 0.25*A"


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, TINY.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def models_of(device, dtype=torch.float32, **fields):
    return {name: tiny_model(seed, **fields).to(device, dtype) for seed, name in enumerate("LSA")}


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
    if invariant:
        alone = [translate(ensemble, [prompt], 20) for prompt in prompts]
        assert [one.logprobs[0] for one in alone] == result.logprobs


@pytest.mark.parametrize("draws", [None, Draws(3, 0.7), Draws(3, 0.7, 20, 0.9)])
@pytest.mark.parametrize("invariant", [False, True])
def test_graphs_choose_what_the_eager_step_chooses(invariant, draws):
    prompts = prompts_of(3, 17, 9, 30, 1, 12, 40, 5)
    models = models_of("cuda")
    with_graphs = Ensemble(models, EXPRESSION, invariant=invariant)
    eager = translate(Ensemble(models, EXPRESSION, invariant=invariant, graphs=False), prompts, 50, 5, draws=draws)
    for _ in range(2):  # the second time with the graphs of the first
        result = translate(with_graphs, prompts, 50, 5, draws=draws)
        assert result.tokens == eager.tokens
        assert result.finished == eager.finished
        for ours, theirs in zip(result.logprobs, eager.logprobs):
            assert ours == (theirs if invariant else pytest.approx(theirs, abs=1e-4))
    graphs = with_graphs.step_graphs.graphs
    assert all(static.graph is not None for static in graphs.values())
    assert {shape.rows for shape in graphs} <= {1, 2, 4, 5}
    assert {keys for shape in graphs for keys in shape.keys} <= {64, 128}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_step_has_the_logits_of_the_step_itself(dtype):
    """Rows at different places that end and start between steps; a graph against the function that it recorded."""
    ensemble = Ensemble(models_of("cuda", dtype, max_position_embeddings=200), EXPRESSION)
    both = [Rows(ensemble, 4, [200] * 3), Rows(ensemble, 4, [200] * 3)]
    assert both[1].graphs is None  # the first has borrowed the ensemble's
    both[1].graphs = StepGraphs(ensemble, 4, [200] * 3, capture=False)
    both[1].caches = both[1].graphs.caches
    for turn in range(12):
        for rows in both:
            if turn % 3 == 0 and len(rows) < 4:
                row = rows.start()
                for number in range(3):
                    rows.forward(number, [[]] * row + [list(range(2, 20 + 11 * turn))], [0] * (row + 1))
            if turn in (5, 8):
                rows.remove([0])
        given = [[7 * turn + row for row in range(len(both[0]))], [(row, turn) for row in range(len(both[0]))]]
        replayed, itself = (rows.step(*given, Draws(1, 0.9)) for rows in both)
        assert replayed.tokens == itself.tokens
        assert replayed.logprobs == pytest.approx(itself.logprobs, abs=1e-5)
        for ours, theirs in zip(replayed.logits, itself.logits):
            torch.testing.assert_close(ours, theirs)


def test_a_replayed_step_takes_no_memory_and_waits_once():
    ensemble = Ensemble(models_of("cuda"), EXPRESSION)
    rows = Rows(ensemble, 2, [64] * 3)
    rows.start()
    rows.step([5], [(0, 0)], None)
    (static,) = rows.graphs.graphs.values()
    taken = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            static.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == taken
    assert rows.graphs.inputs_IB[4:, 0].tolist() == [4] * 3  # positions went on by themselves


def test_members_on_several_devices_have_no_graph():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = {"L": tiny_model(0).to("cuda:0"), "S": tiny_model(1).to("cuda:1")}
    ensemble = Ensemble(models)
    assert not ensemble.graphs
    prompts = prompts_of(3, 17, 9)
    expected = translate(Ensemble({"L": tiny_model(0), "S": tiny_model(1)}), prompts, 20)
    assert translate(ensemble, prompts, 20).tokens == expected.tokens
