"""Packed attention as far as a CPU can check it: the blocks that a GPU reads, and flex_attention uncompiled."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.flex_attention import FlexAttention, block_mask, visible_blocks
from minillama.packed_attention import PackedSequences


def dense(lengths, prefix):
    """(T, T) bool by definition."""
    numbers = np.concatenate([np.full(prefix, -1), np.repeat(np.arange(len(lengths)), lengths)])
    position = np.arange(len(numbers))
    same = (numbers[:, None] == numbers) | (numbers < 0)
    return same & (position[:, None] >= position)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 40), st.sampled_from((4, 16)))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_blocks_cover_all_that_is_visible_and_full_ones_nothing_else(lengths, prefix, block):
    partial, full = visible_blocks([4096] * 4, 0, 128)
    assert (partial.sum(), full.sum()) == (4 * 32, 4 * 31 * 32 // 2)  # blocks of other sequences are not read
    partial, full = visible_blocks(lengths, prefix, block)
    visible = dense(lengths, prefix)
    assert not (partial & full).any()
    for query in range(len(partial)):
        for key in range(len(partial)):
            block_of = visible[query * block : (query + 1) * block, key * block : (key + 1) * block]
            if full[query, key]:
                assert block_of.all()
            elif not partial[query, key]:
                assert not block_of.any()


def test_both_ways_to_compute_packed_attention_equal_the_dense_mask():
    packed = PackedSequences((3, 130, 40), prefix=11)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, packed.total, 16, generator=generator) for heads in (4, 2, 2))
    visible = torch.from_numpy(dense(packed.lengths, packed.prefix))
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=visible, enable_gqa=True)
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(packed.lengths, packed.prefix, torch.device("cpu"))
    flex = FlexAttention(mask, flex_attention).attend(q, k, v)
    buckets = packed.bucket_attention(torch.device("cpu")).attend(q, k, v)
    assert (flex - expected).abs().max() < 1e-5
    assert (buckets - expected).abs().max() < 1e-5
