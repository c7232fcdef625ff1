"""The step that a CUDA graph replays gives the bits of the eager one, run here without a graph; on a GPU with it."""

from itertools import chain

import pytest
import torch
from engine_requests import CAPACITY, COMBINE, KINDS, mixed
from fake_cuda import fake_cuda, fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from decode import Ensemble
from decode.engine.cuda_graph import Buffers, GraphRunner, Shape, balanced, keys_read
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence
from minillama import InputError


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 9),
    kinds=st.sampled_from((KINDS[:4], KINDS[:4], KINDS[:5])),  # a step with beams is eager
    slots=st.integers(4, 6),
    cancelled=st.integers(0, 20),
    speculate=st.sampled_from(("off", "off", 2)),
)
def test_every_step_and_cache_is_that_of_the_eager_engine(models, seed, count, kinds, slots, cancelled, speculate):
    """Sequences start, end, are cancelled and change slots between steps; logits and caches are compared too."""
    both = Ensemble(models, COMBINE, graphs=False), Ensemble(models, COMBINE, graphs=True)
    engines = [Engine(ensemble, slots, CAPACITY, speculate) for ensemble in both]
    eager, replayed = engines
    assert eager.runner.graphs is None
    step = 0
    for engine in engines:
        for sequence in mixed(seed, count, kinds, longest=40, new=40):  # more keys than one bucket has
            engine.add(sequence)
    while eager.has_work:
        if step == cancelled:
            for engine in engines:
                engine.cancel(0)
        ours, theirs = replayed.step(), eager.step()
        assert ours == theirs
        used = [[(slot.index, slot.lengths) for slot in engine.runner.slots.used] for engine in engines]
        assert used[0] == used[1]
        for member, caches in enumerate(zip(*(engine.runner.slots.caches for engine in engines))):
            for index, lengths in used[0]:
                held = [cache.entries_LBSEKC[:, index, : lengths[member]] for cache in caches]
                assert torch.equal(*held)
        step += 1
    assert not replayed.has_work


def test_attention_reads_less_than_twice_the_blocks_that_are_filled():
    for filled in range(1, 3000):
        blocks, read = -(-filled // 64), keys_read(filled, 1 << 20) // 64
        assert blocks <= read < 2 * blocks
        assert read & (read - 1) == 0
    assert keys_read(200, 192 + 64) == 256
    assert keys_read(130, 192) == 192


def test_members_are_divided_evenly_among_streams():
    assert balanced([10, 1, 1], 2) == [[0], [1, 2]]
    assert balanced([1, 1, 10], 2) == [[2], [0, 1]]
    assert balanced([5], 2) == [[0]]
    assert sorted(chain(*balanced([3, 4, 5, 6, 7], 2))) == [0, 1, 2, 3, 4]


def test_shapes_are_few(models):
    ensemble = Ensemble(models, COMBINE, graphs=True)
    sequences = [Sequence(([5, 6, 7],) * 3, max_new_tokens=100, stop_tokens=frozenset()) for _ in range(5)]
    engine = Engine(ensemble, 5, 103)
    dict(engine.generate(sequences))
    buffers = engine.runner.graphs.buffers
    assert {(shape.slots, shape.keys) for shape in buffers} == {(5, (64,) * 3), (5, (128,) * 3)}
    sequences = [Sequence(([5, 6, 7],) * 3, max_new_tokens=count, stop_tokens=frozenset()) for count in (9, 9, 5)]
    dict(engine.generate(sequences))
    assert {shape.slots for shape in buffers} == {2, 4, 5}
    kinds = [
        {"params": SamplingParams(0.5)},
        {"params": SamplingParams(0.7, 20, 0.9, seed=-4)},
        {"weights": (1.0, 1.0, 1.0)},
    ]
    dict(engine.generate([Sequence(([5],) * 3, max_new_tokens=4, **kind) for kind in kinds]))
    assert {(shape.own_weights, shape.sampled, shape.truncated) for shape in buffers} == {
        (False, False, False),
        (True, True, True),
    }


def test_on_a_cpu_nothing_is_a_graph_unless_requested(models, monkeypatch):
    from decode.engine.ensemble import _graphs_enabled

    assert not Ensemble(models).graphs
    monkeypatch.setenv("COLLAB_GRAPHS", "never")
    with pytest.raises(InputError, match="COLLAB_GRAPHS=never"):
        _graphs_enabled()
    monkeypatch.setenv("COLLAB_GRAPHS", "off")
    assert not _graphs_enabled()


@pytest.mark.parametrize(("sampled", "truncated"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("own_weights", "invariant"), [(False, False), (True, True)])
def test_nothing_in_a_step_waits_for_the_device(monkeypatch, sampled, truncated, own_weights, invariant):
    with fake_cuda(monkeypatch), torch.inference_mode():
        models = {name: fake_model(TINY) for name in "LS"}
        ensemble = Ensemble(models, "L + 0.5*S", invariant=invariant)
        caches = [model.cache(8, 128) for model in ensemble.models]
        runner = GraphRunner(ensemble, caches, 8)
        runner.capture = False
        buffers = Buffers()
        for _ in range(2):
            runner._run(Shape(4, (64, 128), own_weights, sampled, truncated), buffers)
        assert [logits_BV.dtype for logits_BV in buffers.logits] == [torch.bfloat16] * 2
        assert buffers.out.token.device.type == "cuda"
        with pytest.raises(RuntimeError):  # the fake would notice
            runner.inputs_IB.sum().item()
