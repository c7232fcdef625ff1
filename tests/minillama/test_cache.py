"""A KVCache only remembers: whatever was appended, forgotten and copied, logits are those of the row's tokens alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import KVCache, Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
CAPACITY = 14


@pytest.fixture(scope="module")
def model():
    # float64: a difference is a fault, not rounding.
    return Llama(CONFIG).init_weights(0, std=0.2).double().eval()


def new_cache(rows):
    return KVCache(CONFIG, rows, CAPACITY, dtype=torch.float64)


@st.composite
def schedules(draw):
    """(rows, operations): appends to all rows, to some through a view, at given positions; truncations; row copies."""
    rows = draw(st.integers(1, 3))
    lengths = [0] * rows
    operations = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["append", "append", "view", "rewrite", "truncate", "copy"]))
        room = CAPACITY - max(lengths)
        if kind == "append" and room:
            count = draw(st.integers(1, min(4, room)))
            operations.append((kind, count))
            lengths = [length + count for length in lengths]
        elif kind == "view":
            first = draw(st.integers(0, rows - 1))
            last = draw(st.integers(first + 1, rows))
            room = CAPACITY - max(lengths[first:last])
            if room:
                count = draw(st.integers(1, min(4, room)))
                exact = draw(st.booleans())
                operations.append((kind, first, last, count, exact))
                lengths[first:last] = [length + count for length in lengths[first:last]]
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


@settings(max_examples=120, deadline=None)
@given(schedule=schedules(), seed=st.integers(0, 1000))
@torch.no_grad()
def test_any_schedule_of_operations_gives_the_logits_of_recomputation(model, schedule, seed):
    rows, operations = schedule
    generator = torch.Generator().manual_seed(seed)
    cache, texts = new_cache(rows), [[] for _ in range(rows)]

    def draw(batch, count):
        return torch.randint(CONFIG.vocab_size, (batch, count), generator=generator)

    for kind, *arguments in operations:
        if kind == "truncate":
            (lengths,) = arguments
            cache.truncate(torch.tensor(lengths))
            texts = [text[:length] for text, length in zip(texts, lengths)]
            continue
        if kind == "copy":
            source, target = arguments
            cache.copy_row(source, target, len(texts[source]))
            texts[target] = list(texts[source])
            continue
        first, last, positions, target = 0, rows, None, cache
        if kind == "append":
            (count,) = arguments
        elif kind == "view":
            first, last, count, exact = arguments
            target = cache.rows(first, last, filled=max(map(len, texts[first:last])) if exact else None)
        else:
            starts, count = arguments
            positions = torch.tensor(starts)[:, None] + torch.arange(count)
            texts = [text[:start] for text, start in zip(texts, starts)]
        tokens = draw(last - first, count)
        logits = model(tokens, cache=target, positions=positions)
        for row in range(first, last):
            texts[row] += tokens[row - first].tolist()
            expected = model(torch.tensor([texts[row]]))[0, -count:]
            torch.testing.assert_close(logits[row - first], expected, rtol=1e-9, atol=1e-9)
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
    with pytest.raises(ValueError, match="past the end"):
        model(tokens[:, :1], cache=cache)


@torch.no_grad()
def test_one_full_row_stops_a_batch_and_a_truncated_one_does_not(model):
    cache = new_cache(2)
    model(torch.zeros(1, CAPACITY, dtype=torch.int64), cache=cache.rows(0, 1))
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache.rows(1, 2))
    step = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="past the end"):
        model(step, cache=cache)
    cache.truncate(torch.tensor([5, 3]))
    assert model(step, cache=cache).shape == (2, 1, CONFIG.vocab_size)
    assert cache.lengths_B.tolist() == [6, 4]


@torch.no_grad()
def test_another_number_of_rows_is_an_error(model):
    with pytest.raises(ValueError, match="3 rows of tokens, but the cache has 2"):
        model(torch.zeros(3, 1, dtype=torch.int64), cache=new_cache(2))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 5], [4, -1]])
def test_truncating_to_what_a_row_does_not_have_is_an_error(model, lengths):
    cache = new_cache(2)
    model(torch.zeros(2, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="can only be truncated to lengths that it has"):
        cache.truncate(torch.tensor(lengths))
    assert cache.lengths_B.tolist() == [4, 4]


@torch.no_grad()
def test_what_is_appended_to_a_view_is_in_the_whole_and_in_no_other_row(model):
    cache = new_cache(3)
    model(torch.tensor([[1, 2], [3, 4], [5, 6]]), cache=cache)
    before = cache.entries_LBSEKC.clone()
    view = cache.rows(1, 2)
    model(torch.tensor([[7, 8, 9]]), cache=view)
    assert cache.lengths_B.tolist() == [2, 5, 2]
    assert view.entries_LBSEKC.data_ptr() == cache.entries_LBSEKC[:, 1:2].data_ptr()
    assert torch.equal(cache.entries_LBSEKC[:, [0, 2]], before[:, [0, 2]])
    logits = model(torch.tensor([[10], [11], [12]]), cache=cache)
    for row, text in enumerate([[1, 2, 10], [3, 4, 7, 8, 9, 11], [5, 6, 12]]):
        torch.testing.assert_close(logits[row, 0], model(torch.tensor([text]))[0, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_view_of_a_view_lengthens_the_whole(model):
    cache = new_cache(3)
    model(torch.tensor([[1, 2, 3, 4, 5]]), cache=cache.rows(1, 3).rows(0, 1))
    assert cache.filled == 5
    logits = model(torch.tensor([[6], [6], [6]]), cache=cache)
    torch.testing.assert_close(logits[1, 0], model(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_stale_entries_are_never_read(model):
    cache = new_cache(2)
    model(torch.full((2, CAPACITY), 7), cache=cache)
    cache.truncate(torch.tensor([0, 2]))
    clean = new_cache(2)
    model(torch.full((1, 2), 7), cache=clean.rows(1, 2))
    tokens = torch.tensor([[1, 2], [3, 4]])
    # Other widths of the mask add in another order: rounding of float64, no more.
    torch.testing.assert_close(model(tokens, cache=cache), model(tokens, cache=clean), rtol=1e-10, atol=1e-10)


def test_the_cache_is_allocated_once_in_the_size_that_it_says():
    cache = KVCache(CONFIG, 5, 33, dtype=torch.bfloat16)
    layers, kv_heads, width = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
    assert cache.nbytes == 2 * layers * 5 * kv_heads * 33 * width * 2
    assert cache.nbytes == 5 * 33 * KVCache.bytes_per_position(CONFIG, torch.bfloat16)
    assert (cache.batch_size, cache.capacity, cache.filled) == (5, 33, 0)
    assert cache.lengths_B.tolist() == [0] * 5
