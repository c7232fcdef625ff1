"""Appends, truncations and copies in a KVCache leave the logits of each sequence's tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import KVCache, Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=6)  # fmt: skip
CAPACITY = 14


@pytest.fixture(scope="module")
def model():
    # float64: a difference is a bug, not rounding.
    return Llama(CONFIG).init_weights(0, std=0.2).double().eval()


def new_cache(rows):
    return KVCache(CONFIG, rows, CAPACITY, dtype=torch.float64)


@st.composite
def schedules(draw):
    """(rows, operations): appends to all rows, at the end or at given positions; truncations; row copies."""
    rows = draw(st.integers(1, 3))
    lengths = [0] * rows
    operations = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["append", "append", "rewrite", "truncate", "copy"]))
        room = CAPACITY - max(lengths)
        if kind == "append" and room:
            count = draw(st.integers(1, min(4, room)))
            operations.append((kind, count))
            lengths = [length + count for length in lengths]
        elif kind == "rewrite" and max(lengths) < CAPACITY:
            starts = [draw(st.integers(0, length)) for length in lengths]
            count = draw(st.integers(1, min(4, CAPACITY - max(starts))))
            operations.append((kind, starts, count))
            lengths = [start + count for start in starts]
        elif kind == "truncate":
            lengths = [draw(st.integers(0, length)) for length in lengths]
            operations.append((kind, list(lengths)))
        elif kind == "copy":
            source, target = draw(st.integers(0, rows - 1)), draw(st.integers(0, rows - 1))
            if source != target:
                operations.append((kind, source, target))
                lengths[target] = lengths[source]
    return rows, operations


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), seed=st.integers(0, 1000))
@torch.no_grad()
def test_any_schedule_of_operations_gives_the_logits_of_recomputation(model, schedule, seed):
    rows, operations = schedule
    generator = torch.Generator().manual_seed(seed)
    cache, texts = new_cache(rows), [[] for _ in range(rows)]

    for kind, *arguments in operations:
        if kind == "truncate":
            (lengths,) = arguments
            cache.lengths_B.copy_(torch.tensor(lengths))
            texts = [text[:length] for text, length in zip(texts, lengths)]
            continue
        if kind == "copy":
            source, target = arguments
            cache.copy_row(source, target, len(texts[source]))
            texts[target] = list(texts[source])
            continue
        positions = None
        if kind == "append":
            (count,) = arguments
        else:
            starts, count = arguments
            positions = torch.tensor(starts)[:, None] + torch.arange(count)
            texts = [text[:start] for text, start in zip(texts, starts)]
        tokens = torch.randint(CONFIG.vocab_size, (rows, count), generator=generator)
        logits = model(tokens, cache=cache, positions=positions)
        for row in range(rows):
            texts[row] += tokens[row].tolist()
            expected = model(torch.tensor([texts[row]]))[0, -count:]
            torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
        assert cache.lengths_B.tolist() == [len(text) for text in texts]
        assert cache.filled >= max(map(len, texts))


@torch.no_grad()
def test_past_the_end_is_an_error_that_leaves_the_cache_usable(model):
    cache = new_cache(2)
    tokens = torch.arange(2 * CAPACITY).view(2, CAPACITY)
    model(tokens[:, : CAPACITY - 1], cache=cache)
    with pytest.raises(ValueError, match=rf"position {CAPACITY} runs past the end of a cache of {CAPACITY} positions"):
        model(tokens[:, :2], cache=cache)
    with pytest.raises(ValueError, match="past the end"):
        model(tokens[:, :1], cache=cache, positions=torch.tensor([[3], [CAPACITY]]))
    with pytest.raises(ValueError, match="negative"):
        model(tokens[:, :1], cache=cache, positions=torch.tensor([[3], [-1]]))
    assert cache.lengths_B.tolist() == [CAPACITY - 1, CAPACITY - 1]
    logits = model(tokens[:, -1:], cache=cache)
    torch.testing.assert_close(logits[:, 0], model(tokens)[:, -1], rtol=1e-9, atol=1e-9)
    for full in (0, 1):  # one full row stops the batch
        with pytest.raises(ValueError, match="past the end"):
            model(tokens[:, :1], cache=cache)
        cache.lengths_B[full] = 3 + full
    assert model(tokens[:, :1], cache=cache).shape == (2, 1, CONFIG.vocab_size)
    assert cache.lengths_B.tolist() == [4, 5]
    with pytest.raises(ValueError, match="3 rows of tokens, but the cache has 2"):
        model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)


@torch.no_grad()
def test_stale_entries_are_never_read(model):
    cache = new_cache(2)
    model(torch.full((2, CAPACITY), 7), cache=cache)
    cache.lengths_B.copy_(torch.tensor([0, 2]))
    clean = new_cache(2)
    model(torch.full((2, 2), 7), cache=clean)
    clean.lengths_B[0] = 0
    tokens = torch.tensor([[1, 2], [3, 4]])
    # Another width of the mask may add in another order: rounding of float64.
    torch.testing.assert_close(model(tokens, cache=cache), model(tokens, cache=clean), rtol=1e-10, atol=1e-10)


def test_the_cache_is_allocated_once_in_the_size_that_it_says():
    cache = KVCache(CONFIG, 5, 33, dtype=torch.bfloat16)
    assert cache.entries_LBSEKC.nbytes == 2 * (2 * 5 * 2 * 33 * 6) * 2
    assert cache.entries_LBSEKC.nbytes == 5 * 33 * KVCache.bytes_per_position(CONFIG, torch.bfloat16)
    assert (cache.batch_size, cache.capacity, cache.filled) == (5, 33, 0)
    assert cache.lengths_B.tolist() == [0] * 5
