"""Weights and sampling parameters per sequence: each gets in a batch what it gets in a call of its own."""

import pytest
import torch
from kernel_cases import device

from kernels import Sampling, fused_logits, reference
from kernels.types import ALL_MASKED, Request

BATCH = 6


def logits_of(path, members=3, batch=BATCH, vocabulary=500):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(batch, vocabulary, generator=generator) * 3).to(device(path)) for _ in range(members)]


def sampling(path, rows=range(BATCH), **parameters):
    row_B = torch.tensor(list(rows), device=device(path))
    return Sampling(parameters.pop("seed", 7), row_B + 30, row_B * 2, **parameters)


def test_a_left_out_members_logits_are_not_used(path):
    """Whatever they hold, the sequence has the bits that an ensemble without the member gives it."""
    logits = logits_of(path)
    weights_NB = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0], [-0.7, 2.0, 0.0, 0.3]])
    weights_NB = weights_NB[:, torch.arange(BATCH) % 4]
    target_BG = torch.tensor([[5, 17]]).repeat(BATCH, 1).to(device(path))
    for number, logits_BV in enumerate(logits):
        for row in range(BATCH):
            if weights_NB[number, row] == 0:
                logits_BV[row] = (torch.nan, torch.inf, -torch.inf)[row % 3]
    result = fused_logits(logits, weights_NB.to(device(path)), members=True, top_k=5, targets=target_BG)
    assert result.flag.tolist() == [0] * BATCH
    for row in range(BATCH):
        used = [number for number in range(3) if weights_NB[number, row] != 0]
        own = [logits[number][row : row + 1] for number in used]
        own_weights_N, targets = weights_NB[used, row].to(device(path)), target_BG[row : row + 1]
        alone = fused_logits(own, own_weights_N, members=True, top_k=5, targets=targets)
        for name in ("token", "logprob", "top_token", "top_logprob", "target_logprob"):
            assert torch.equal(getattr(result, name)[row], getattr(alone, name)[0]), name
        for name in ("member_logprob", "member_target_logprob"):
            assert torch.equal(getattr(result, name)[used, row], getattr(alone, name)[:, 0]), name
            left_out = [number for number in range(3) if number not in used]
            assert getattr(result, name)[left_out, row].isnan().all(), name
    healthy, broken = logits[0].nan_to_num(0.0, 0.0, 0.0), torch.full_like(logits[1], torch.nan)
    shared = fused_logits([healthy, broken], [0.5, 0.0])  # of weight zero in every sequence
    assert torch.equal(shared.logprob, fused_logits([healthy], [0.5]).logprob)


def test_weights_that_are_all_zero_are_flagged_where_nobody_can_look_at_them(path):
    """On the CPU `fused_logits` refuses them; a kernel on a GPU gets them unseen."""
    logits, weights_NB = logits_of(path, members=2), torch.ones(2, BATCH, device=device(path))
    weights_NB[:, 3] = 0
    request = Request(tuple(logits), weights_NB)
    if path == "triton":
        from kernels.triton import fused_logits as implementation

        flag_B = implementation.run(request).flag
    else:
        flag_B = reference.fused_logits(request).flag
    assert flag_B.tolist() == [ALL_MASKED * 16 if row == 3 else 0 for row in range(BATCH)]


def test_members_have_the_bits_of_a_call_with_that_member_alone():
    logits = [logits_BV.to(dtype) for logits_BV, dtype in zip(logits_of("cpu"), (torch.float32, torch.bfloat16) * 2)]
    logits[1][:, 3] = -torch.inf
    target_BG = torch.tensor([[0, 3, 499, 500]]).repeat(BATCH, 1)
    sample = sampling("cpu", temperature=2.0)
    result = fused_logits(logits, [1.0, -0.5, 0.25], members=True, targets=target_BG, sample=sample)
    sampled_B1 = result.sample_token[:, None]
    assert (result.sample_token != result.token).any()
    for number, logits_BV in enumerate(logits):
        alone = fused_logits([logits_BV], [1.0], targets=torch.cat((sampled_B1, target_BG), dim=1)).target_logprob
        assert torch.equal(result.member_logprob[number], alone[:, 0])
        theirs_BG = alone[:, 1:]
        assert torch.equal(result.member_target_logprob[number].nan_to_num(9.0), theirs_BG.nan_to_num(9.0))
        assert theirs_BG[:, 3].isnan().all()


def test_every_sequence_samples_as_it_would_with_the_same_parameters_for_all(path):
    """Seeds, temperatures (0 is greedy), top_k and top_p in any mixture, some of them not truncated at all."""
    logits, weights = logits_of(path), [1.0, 0.5, -0.25]
    logits[0][4, 7] = torch.nan
    parameters = {
        "seed": [0, 1, -5, 2**62, 0, 3],
        "temperature": [1.0, 0.7, 0.0, 2.0, 0.0, 1.5],
        "top_k": [0, 0, 5, 20, 0, 1000],
        "top_p": [1.0, 0.5, 1.0, 0.875, 0.25, 1.0],
    }
    tensors = {name: torch.tensor(values, device=device(path)) for name, values in parameters.items()}
    mixed = fused_logits(logits, weights, sample=sampling(path, **tensors))
    assert mixed.sample_token[4] == -1
    for row in range(BATCH):
        numbers = {name: values[row] for name, values in parameters.items()}
        of_row = [logits_BV[row : row + 1] for logits_BV in logits]
        alone = fused_logits(of_row, weights, sample=sampling(path, [row], **numbers))
        for name in ("token", "logprob", "flag", "sample_token", "sample_logprob"):
            assert torch.equal(getattr(mixed, name)[row].nan_to_num(9), getattr(alone, name)[0].nan_to_num(9)), name
        if numbers["temperature"] == 0:
            assert mixed.sample_token[row] == mixed.token[row]
            assert torch.equal(mixed.sample_logprob[row].nan_to_num(9), mixed.logprob[row].nan_to_num(9))


def test_the_eager_reference_means_the_same(path, monkeypatch):
    logits, weights_NB = logits_of(path, batch=3), torch.ones(3, 3, device=device(path))
    weights_NB[1, ::2] = 0
    logits[1][::2] = torch.nan
    temperature_B = torch.linspace(0.0, 2.0, 3, device=device(path))
    top_k_B = torch.arange(3, device=device(path))
    sample = sampling(path, range(3), temperature=temperature_B, top_k=top_k_B, top_p=0.9)
    requested = {"members": True, "top_k": 32 if path == "cpu" else 8, "targets": top_k_B, "sample": sample}
    ours = fused_logits(logits, weights_NB, **requested)
    monkeypatch.setenv("COLLAB_KERNELS", "eager")
    eager = fused_logits(logits, weights_NB, **requested)
    for name in ("token", "flag", "sample_token", "top_token"):
        assert torch.equal(getattr(ours, name), getattr(eager, name)), name
    for name in ("logprob", "sample_logprob", "top_logprob", "target_logprob", "member_logprob"):
        torch.testing.assert_close(getattr(ours, name), getattr(eager, name), equal_nan=True)
    torch.testing.assert_close(ours.member_target_logprob, eager.member_target_logprob, equal_nan=True)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": torch.tensor([1.0, torch.nan])}, "temperature must be 0 or more"),
        ({"temperature": torch.ones(3)}, r"temperature must be \(2,\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be \(2,\)"),
        ({"top_k": torch.tensor([1, -1])}, "top_k must be 0 or more"),
        ({"top_k": torch.ones(2)}, "int64"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": torch.tensor([0.5, 1.5])}, "top_p must be above 0"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        fused_logits([torch.zeros(2, 5)], [1.0], sample=sampling("cpu", range(2), **parameters))
    with pytest.raises(ValueError, match="row_id"):
        fused_logits([torch.zeros(2, 5)], [1.0], sample=sampling("cpu", range(3)))
