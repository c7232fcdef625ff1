"""The step that a CUDA graph replays gives the bits of the eager one, run here without a graph; on a GPU with it."""

import pytest
import torch
from fake_cuda import fake_cuda, fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from decode import Ensemble, translate
from decode.draws import Draws
from decode.engine.ensemble import graphs_wanted
from decode.engine.kv_slots import Rows
from decode.engine.cuda_graph import Shape, Static, StepGraphs, keys_read
from decode.translate import Counters, decode
from minillama import InputError

EXPRESSION = "L + 0.5*S - 0.25*A"
DRAWS = Draws(seed=-4, temperature=0.7, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def models():
    """Members of different depths, widths and contexts: a bucket of keys is each one's own."""
    return {
        "L": tiny_model(0, max_position_embeddings=200),
        "S": tiny_model(1, num_hidden_layers=1, max_position_embeddings=150),
        "A": tiny_model(2, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=200),
    }


@pytest.fixture(scope="module")
def both(models):
    return Ensemble(models, EXPRESSION, graphs=False), Ensemble(models, EXPRESSION, graphs=True)


def prompts_of(seed, count, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, TINY.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch_size=st.integers(1, 9),
    count=st.integers(1, 9),
    new=st.integers(1, 40),
    speculate=st.sampled_from(("off", "off", "auto", 3)),
    draws=st.sampled_from((None, DRAWS)),
)
def test_tokens_and_log_probabilities_are_the_eager_steps(both, seed, batch_size, count, new, speculate, draws):
    prompts = {"L": prompts_of(seed, count), "S": prompts_of(seed + 1, count, 3), "A": prompts_of(seed + 2, count, 60)}
    eager, static = (translate(e, prompts, new, batch_size, speculate=speculate, draws=draws) for e in both)
    assert static.tokens == eager.tokens
    assert static.logprobs == eager.logprobs
    assert static.finished == eager.finished


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_members_logits_and_caches_are_the_eager_steps_whatever_rows_do(both, data):
    """Rows start, end, close gaps, read several tokens and forget some, in any order between plain steps."""
    ensembles = [Rows(ensemble, 6, [150, 150, 150], [[5, 6], [7], []]) for ensemble in both]
    eager, static = ensembles
    members = range(3)
    for _ in range(data.draw(st.integers(4, 14))):
        moves = ["step"] * 3 + ["start", "remove", "read", "forget"]
        move = data.draw(st.sampled_from(moves if len(eager) else ["start"]))
        if move == "start" and len(eager) < 6:
            lengths = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
            for rows in ensembles:
                row = rows.start()
                for number, length in enumerate(lengths):
                    new = [[]] * row + [[(3 * at + row) % 300 + 2 for at in range(length)]]
                    rows.forward(number, new, [0] * (row + 1))
        elif move == "remove":
            gone = data.draw(st.sets(st.integers(0, len(eager) - 1)))
            assert eager.remove(list(gone)) == static.remove(list(gone))
        elif move in ("read", "forget"):
            row = data.draw(st.integers(0, len(eager) - 1))
            for rows in ensembles:
                for number in members:
                    rows.forward(number, [[]] * row + [[9, 8, 7]], [0] * (row + 1))
                rows.forget(row, 3 if move == "forget" else 1)
        elif len(eager):
            tokens = data.draw(st.lists(st.integers(0, 399), min_size=len(eager), max_size=len(eager)))
            expected = [eager.forward(number, [[t] for t in tokens], [1] * len(tokens)) for number in members]
            chosen = static.step(tokens, [(0, 0)] * len(tokens), None)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(chosen.logits, expected))
            best = both[0].choose(expected)
            assert (chosen.tokens, chosen.logprobs) == (best.tokens, best.logprobs)
        assert eager.lengths == static.lengths
        for ours, theirs, number in zip(static.caches, eager.caches, members):
            for row, lengths in enumerate(eager.lengths):
                held = slice(0, lengths[number])
                assert torch.equal(ours.entries_LBSEKC[:, row, held], theirs.entries_LBSEKC[:, row, held])


def test_attention_reads_less_than_twice_the_blocks_that_are_filled():
    for filled in range(1, 3000):
        blocks, read = -(-filled // 64), keys_read(filled, 1 << 20) // 64
        assert blocks <= read < 2 * blocks
        assert read & (read - 1) == 0
    assert keys_read(200, 192 + 64) == 256
    assert keys_read(130, 192) == 192


def test_what_the_device_holds_already_is_not_written_again(models, monkeypatch):
    ensemble = Ensemble(models, EXPRESSION, graphs=True)
    written = []
    write = StepGraphs._write
    monkeypatch.setattr(StepGraphs, "_write", lambda self, inputs: written.append(len(inputs)) or write(self, inputs))
    result = translate(ensemble, prompts_of(1, 4), 40, batch_size=4, ignore_eos=True, draws=DRAWS)
    assert result.steps == 40
    assert len(written) == 1


def test_shapes_are_few_and_kept_for_the_next_call(models):
    ensemble = Ensemble(models, EXPRESSION, graphs=True)
    prompts = [[5, 6, 7]] * 5
    first = translate(ensemble, prompts, 100, batch_size=5, ignore_eos=True)
    kept = ensemble.step_graphs
    assert {(shape.rows, shape.keys) for shape in kept.graphs} == {(5, (64,) * 3), (5, (128,) * 3)}
    assert translate(ensemble, prompts[:3], 80, batch_size=9).tokens == [tokens[:80] for tokens in first.tokens[:3]]
    assert ensemble.step_graphs is kept
    assert {shape.rows for shape in kept.graphs} == {4, 5}
    longer = translate(ensemble, prompts, 140, batch_size=6, ignore_eos=True)
    assert ensemble.step_graphs is not kept
    assert [tokens[:100] for tokens in longer.tokens] == first.tokens


def test_two_runs_at_once_do_not_share_their_caches(models, both):
    ensemble = Ensemble(models, EXPRESSION, graphs=True)
    prompts = [(prompt,) * 3 for prompt in prompts_of(3, 4)]
    expected = translate(both[0], [prompt for prompt, _, _ in prompts], 20, 2).tokens
    one, other = (decode(ensemble, prompts, 20, 2, ensemble.stop_tokens, Counters()) for _ in range(2))
    found = [{}, {}]
    for pair in zip(one, other):
        for tokens, (index, translation) in zip(found, pair):
            tokens[index] = translation.tokens
    assert found == [dict(enumerate(expected))] * 2


def test_a_member_with_a_nan_is_named_and_leaves_a_token_that_can_be_read(models):
    broken = tiny_model(3)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    ensemble = Ensemble({"L": models["L"], "S": broken}, "L + S", graphs=True)
    rows = Rows(ensemble, 2, [64, 64])
    rows.start()
    chosen = rows.step([5], [(0, 0)], None)
    assert chosen.tokens == [-1]
    assert rows.graphs.inputs_IB[0].tolist() == [0, 0]
    with pytest.raises(FloatingPointError, match="S"):
        ensemble.check(chosen.flags)


def test_a_row_at_the_end_of_its_cache_is_an_error(both):
    rows = Rows(both[1], 2, [64, 64, 64])
    rows.start()
    rows.lengths[0][1] = rows.caches[1].capacity
    with pytest.raises(ValueError, match="runs past the end of a cache"):
        rows.step([5], [(0, 0)], None)


def test_on_a_cpu_nothing_is_a_graph_unless_it_is_asked_for(models, monkeypatch):
    assert not Ensemble(models).graphs
    monkeypatch.setenv("COLLAB_GRAPHS", "never")
    with pytest.raises(InputError, match="COLLAB_GRAPHS=never"):
        graphs_wanted()
    monkeypatch.setenv("COLLAB_GRAPHS", "off")
    assert not graphs_wanted()


@pytest.mark.parametrize("truncation", [None, (0, 1.0), (5, 0.9)])
@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_in_a_step_waits_for_the_device(monkeypatch, truncation, invariant):
    with fake_cuda(monkeypatch), torch.inference_mode():
        models = {name: fake_model(TINY) for name in "LS"}
        graphs = StepGraphs(Ensemble(models, "L + 0.5*S", invariant=invariant), 8, [128, 128], capture=False)
        static = Static()
        for _ in range(2):
            graphs._run(Shape(4, (64, 128), truncation), static)
        assert [logits_BV.dtype for logits_BV in static.logits] == [torch.bfloat16] * 2
        assert static.out.token.device.type == "cuda"
        with pytest.raises(RuntimeError):  # the fake would notice
            graphs.inputs_IB.sum().item()
