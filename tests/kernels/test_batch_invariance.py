"""A row's results are the same bits alone, in any batch, at any place and at any alignment."""

import pytest
import torch
from kernel_cases import Case, count, device

from kernels import Sampling, fused_head, fused_logits, verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("token", "logprob", "flag", "member_logprob", "top_token", "top_logprob", "entropy", "given_logprob")
RESULTS += ("sample_token", "sample_logprob")


def bits(result, name, rows_I):
    values = getattr(result, name)
    values = values[:, rows_I] if name == "member_logprob" else values[rows_I]
    return values.view(torch.int32) if values.dtype == torch.float32 else values


def everything(logits, weights_NB, given_RG, row_id_R):
    sample = Sampling(9, row_id_R, row_id_R * 3, temperature=0.8)
    asked = {"members": True, "top_k": 4, "entropy": True, "given": given_RG, "sample": sample}
    return fused_logits(logits, weights_NB, **asked)


TRUNCATED = ("token", "logprob", "flag", "sample_token", "sample_logprob")
VERIFIED = ("accepted", "token", "logprob", "flag")


@pytest.mark.parametrize(
    ("names", "interpreted_batches"),
    [
        pytest.param(RESULTS, 50, id="all results of one pass"),
        pytest.param(VERIFIED, 50, id="verification"),
        # ten launches a draw: interpreted, a third of a second for each row
        pytest.param(TRUNCATED, 6, id="truncated sample"),
        pytest.param(TRUNCATED, 50, id="truncated sample, longer", marks=pytest.mark.slow),
    ],
)
def test_a_row_alone_and_in_fifty_batches(path, names, interpreted_batches):
    interpreted = path == "triton" and device(path) == "cpu"
    rows, positions = 12, 4 if names == VERIFIED else 1
    vocabulary = 4_200 if interpreted else 20_000
    weights = (1.0, -0.3, 0.7)
    case = Case(rows * positions, vocabulary, DTYPES, (0, 3, 8), weights, True, "mask one member", 4.0, seed=11)
    request = case.request(device(path))
    request.logits[0][3, 5] = torch.nan
    generator = torch.Generator().manual_seed(1)
    given_RG = torch.randint(0, vocabulary, (rows, 2), generator=generator).to(device(path))
    row_id_R = torch.arange(100, 100 + rows, device=device(path))
    weights_NR = request.weights[:, :rows]
    best_R = fused_logits(request.logits, weights_NR.repeat_interleave(positions, dim=1)).token
    draft_RT = best_R.view(rows, positions)[:, :-1].clone()
    for row in range(rows):  # drafts that agree for 0 to 3 positions
        draft_RT[row, row % positions :] += 1

    def some(rows_I):
        logits = [l_RV.unflatten(0, (rows, positions))[rows_I] for l_RV in request.logits]
        weights_NI = weights_NR[:, rows_I].contiguous()
        if names == VERIFIED:
            return verify(logits, weights_NI, draft_RT[rows_I])
        logits = [l_ITV[:, 0] for l_ITV in logits]
        if names == RESULTS:
            return everything(logits, weights_NI, given_RG[rows_I], row_id_R[rows_I])
        sample = Sampling(9, row_id_R[rows_I], row_id_R[rows_I] * 3, temperature=0.8, top_k=40, top_p=0.9)
        return fused_logits(logits, weights_NI, sample=sample)

    alone = [some(torch.tensor([row])) for row in range(rows)]
    if names == VERIFIED:
        assert {int(result.accepted) for result in alone} == {0, 1, 2, 3}
    for _ in range(interpreted_batches if interpreted else 50):
        size = int(torch.randint(1, 4 if interpreted else rows + 1, (), generator=generator))
        rows_I = torch.randperm(rows, generator=generator)[:size]
        result = some(rows_I)
        for place, row in enumerate(rows_I.tolist()):
            for name in names:
                assert torch.equal(bits(result, name, [place]), bits(alone[row], name, [0])), name
        kind = {RESULTS: "one pass", VERIFIED: "verification"}.get(names, "truncated sample")
        count(f"rows bit for bit in random batches, {kind}", size)


def test_large_batches_on_the_cpu():
    """Tiles become narrower with the batch; two threads share the larger ones."""
    torch.set_num_threads(2)
    case = Case(64, 9001, DTYPES, (0, 1, 0), (1.0, 0.5, -1.0), False, "none", 4.0, seed=12)
    request = case.request("cpu")
    given_RG, row_id_R = torch.zeros(64, 1, dtype=torch.int64), torch.arange(64)
    whole = everything(request.logits, request.weights, given_RG, row_id_R)
    for size in (1, 2, 3, 8, 31, 33):
        part = everything([l_RV[:size] for l_RV in request.logits], request.weights, given_RG[:size], row_id_R[:size])
        for name in RESULTS:
            assert torch.equal(bits(part, name, slice(None)), bits(whole, name, slice(size))), (size, name)


def test_the_place_in_memory_does_not_matter(path):
    vocabulary = 4_500
    case = Case(2, vocabulary, DTYPES, (0, 0, 0), (1.0, 0.5, -1.0), False, "none", 4.0, seed=13)
    request = case.request(device(path))
    given_RG = torch.tensor([[1], [2]], device=device(path))
    row_id_R = torch.tensor([4, 5], device=device(path))
    first = everything(request.logits, request.weights, given_RG, row_id_R)
    for shift, padding in ((1, 0), (3, 5), (8, 16)):
        moved = []
        for l_RV in request.logits:
            wide = torch.empty(2, vocabulary + shift + padding, dtype=l_RV.dtype, device=l_RV.device)
            wide[:, shift : shift + vocabulary] = l_RV
            moved.append(wide[:, shift : shift + vocabulary])
        result = everything(moved, request.weights, given_RG, row_id_R)
        for name in RESULTS:
            assert torch.equal(bits(result, name, slice(None)), bits(first, name, slice(None))), name


def test_the_fused_head_in_triton_keeps_a_row_too(monkeypatch):
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    generator = torch.Generator().manual_seed(3)
    where = device("triton")
    hidden = [torch.randn(70, width, generator=generator).to(where) for width in (32, 48)]
    output = [torch.randn(300, width, generator=generator).to(where) for width in (32, 48)]
    given_R = torch.randint(0, 300, (70,), generator=generator).to(where)
    whole = fused_head(hidden, output, [1.0, 0.5], given=given_R)
    for rows_I in torch.randperm(70, generator=generator).split(11)[:4]:
        part = fused_head([h_RD[rows_I] for h_RD in hidden], output, [1.0, 0.5], given=given_R[rows_I])
        for name in ("token", "logprob", "given_logprob"):
            assert torch.equal(bits(part, name, slice(None)), bits(whole, name, rows_I)), name
