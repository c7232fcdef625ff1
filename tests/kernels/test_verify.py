"""Verification of drafted tokens against the combined argmax."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import device

from kernels import fused_logits, reference, verify
from kernels.types import NAN, Request


def accepted_prefix(best_BT, draft_BT):
    """The definition with Python's own loops."""
    lengths = []
    for best, draft in zip(best_BT.tolist(), draft_BT.tolist(), strict=True):
        length = 0
        while length < len(draft) and draft[length] == best[length]:
            length += 1
        lengths.append(length)
    return lengths


@given(
    batch=st.integers(1, 4),
    drafted=st.integers(1, 6),
    vocabulary=st.sampled_from((5, 300, 4100)),
    per_row=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_longest_agreeing_prefix_and_the_next_token(path, batch, drafted, vocabulary, per_row, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, drafted + 1, vocabulary, generator=generator).to(device(path)) for _ in range(2)]
    weights = torch.tensor([[1.0], [0.5]]) * (1 + torch.rand(1, batch, generator=generator))
    weights = (weights if per_row else weights[:, 0]).contiguous().to(device(path))
    shared = weights if per_row else weights[:, None].expand(-1, batch)
    x_BTV = sum(w_B[:, None, None] * l_BTV for w_B, l_BTV in zip(shared, logits, strict=True))
    best_BT = x_BTV.argmax(dim=2)
    draft_BT = best_BT[:, :drafted].clone()
    wrong_BT = (torch.rand(draft_BT.shape, generator=generator) < 0.3).to(device(path))
    draft_BT = torch.where(wrong_BT, (draft_BT + 1) % vocabulary, draft_BT)
    result = verify(logits, weights, draft_BT)
    lengths = accepted_prefix(best_BT, draft_BT)
    assert result.accepted.tolist() == lengths
    assert result.token.tolist() == [best_BT[row, length].item() for row, length in enumerate(lengths)]
    assert result.flag.tolist() == [0] * batch
    step = fused_logits(
        [l_BTV.flatten(0, 1) for l_BTV in logits], shared.repeat_interleave(drafted + 1, dim=1).contiguous()
    )
    assert torch.equal(result.steps.token, step.token)
    assert torch.equal(result.steps.logprob, step.logprob)
    end = torch.arange(batch) * (drafted + 1) + torch.tensor(lengths)
    assert torch.equal(result.logprob.cpu(), step.logprob.cpu()[end])
    for _ in range(2):
        again = verify(logits, weights, draft_BT, out=result)
        assert again.accepted.tolist() == lengths


def test_a_shorter_draft_is_padded(path):
    logits = torch.zeros(2, 4, 10, device=device(path))
    logits[..., 6] = 1.0
    draft = torch.tensor([[6, 6, -1], [-1, 6, 6]], device=device(path))
    assert verify([logits], [1.0], draft).accepted.tolist() == [2, 0]


def test_a_flagged_position_ends_the_prefix_and_flags_the_row(path):
    logits = torch.zeros(3, 4, 10, device=device(path))
    logits[..., 6] = 1.0
    logits[1, 2, 0] = logits[2, 3, 0] = torch.nan
    draft = torch.tensor([[6, 6, 6], [6, 6, 6], [6, 0, 6]], device=device(path))
    result = verify([logits], [1.0], draft)
    assert result.accepted.tolist() == [3, 2, 1]
    assert result.token.tolist() == [6, -1, 6]
    # the third row's wrong value lies past the end of its prefix and was never needed
    assert result.flag.tolist() == [0, NAN * 16 + 1, 0]


def test_the_eager_definition_counts_the_same():
    logits = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    draft = logits.argmax(dim=2)[:, :4].clone()
    draft[1, 2] += 1
    rows = (logits.flatten(0, 1),)
    truth = reference.verify(Request(rows, torch.ones(1), draft=draft, every=5), torch.float64)
    assert truth.accepted.tolist() == [4, 2, 4]
