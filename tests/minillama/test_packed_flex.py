"""The GPU's packed attention, as far as a CPU can tell: which blocks it reads, and what it computes uncompiled."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.packed_attention import Documents
from minillama.flex_attention import FlexAttention, block_mask, visible_blocks


def dense(lengths, prefix):
    """(T, T) bool by the definition."""
    numbers = np.concatenate([np.full(prefix, -1), np.repeat(np.arange(len(lengths)), lengths)])
    place = np.arange(len(numbers))
    same = (numbers[:, None] == numbers) | (numbers < 0)
    return same & (place[:, None] >= place)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 40), st.sampled_from((4, 16)))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_blocks_hold_all_that_is_visible_and_whole_ones_nothing_else(lengths, prefix, block):
    partly, wholly = visible_blocks(lengths, prefix, block)
    visible = dense(lengths, prefix)
    assert not (partly & wholly).any()
    for query in range(len(partly)):
        for key in range(len(partly)):
            part = visible[query * block : (query + 1) * block, key * block : (key + 1) * block]
            if wholly[query, key]:
                assert part.all()
            elif not partly[query, key]:
                assert not part.any()


def test_blocks_of_other_documents_are_not_read():
    partly, wholly = visible_blocks([4096] * 4, 0, 128)
    assert partly.sum() + wholly.sum() == 4 * 32 * 33 // 2
    assert partly.sum() == 4 * 32  # the diagonal alone


def test_flex_attention_on_the_row_is_attention_on_each_document():
    documents = Documents((3, 130, 40, 200), prefix=11)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, documents.total, 16, generator=generator) for heads in (4, 2, 2))
    visible = torch.from_numpy(dense(documents.lengths, documents.prefix))
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=visible, enable_gqa=True)
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(documents.lengths, documents.prefix, torch.device("cpu"))
    flex = FlexAttention(mask, flex_attention).attend(q, k, v)
    rectangles = documents.in_rectangles(torch.device("cpu")).attend(q, k, v)
    assert (flex - expected).abs().max() < 1e-5
    assert (rectangles - expected).abs().max() < 1e-5
