"""A sequence's results are the same bits alone, in any batch, at any position of it and at any memory alignment."""

import torch
from kernel_cases import BOTH_PATHS, Case, device

from kernels import Sampling, fused_logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("token", "logprob", "flag", "member_logprob", "member_target_logprob", "top_token", "top_logprob")
RESULTS += ("target_logprob", "sample_token", "sample_logprob")


def bits(result, name, rows_I):
    values = getattr(result, name)
    values = values[:, rows_I] if name.startswith("member") else values[rows_I]
    return values.view(torch.int32) if values.dtype == torch.float32 else values


def everything(logits, weights_NB, target_BG, row_id_B, truncated=False):
    """Every result; a third of the sequences is greedy, the others have sampling parameters of their own."""
    temperature_B = (row_id_B % 3).float() * 0.4
    truncation = {"top_k": row_id_B % 5 * 9, "top_p": 1 - (row_id_B % 4) * 0.2} if truncated else {}
    sample = Sampling(row_id_B * 2**40 - 7, row_id_B, row_id_B * 3, temperature_B, **truncation)
    return fused_logits(logits, weights_NB, members=True, top_k=4, targets=target_BG, sample=sample)


@BOTH_PATHS
def test_a_truncated_sample_alone_and_in_random_batches(path):
    """Plain runs have one mixed batch for Triton, in test_sequence_parameters.py."""
    compare(path, truncated=True)


def test_every_result_of_one_launch_alone_and_in_random_batches(path):
    compare(path, truncated=False)


def compare(path, truncated):
    interpreted = path == "triton" and device(path) == "cpu"
    rows, vocabulary = (6, 4_200) if interpreted else (12, 20_000)
    case = Case(rows, vocabulary, DTYPES, (0, 3, 8), (1.0, -0.3, 0.7), True, True, "mask one member", 4.0, seed=11)
    request = case.request(device(path))
    request.logits[0][rows - 1, 5] = torch.nan
    generator = torch.Generator().manual_seed(1)
    target_RG = torch.randint(0, vocabulary, (rows, 2), generator=generator).to(device(path))
    row_id_R = torch.arange(100, 100 + rows, device=device(path))

    def some(rows_I):
        logits, weights_NI = [l_RV[rows_I] for l_RV in request.logits], request.weights[:, rows_I].contiguous()
        return everything(logits, weights_NI, target_RG[rows_I], row_id_R[rows_I], truncated)

    alone = [some(torch.tensor([row])) for row in range(rows)]
    for _ in range(5 if interpreted else 50):
        size = int(torch.randint(2, 4 if interpreted else rows + 1, (), generator=generator))
        rows_I = torch.randperm(rows, generator=generator)[:size]
        result = some(rows_I)
        for index, row in enumerate(rows_I.tolist()):
            for name in RESULTS:
                assert torch.equal(bits(result, name, [index]), bits(alone[row], name, [0])), name


def test_large_batches_on_the_cpu(two_threads):
    """Tiles become narrower with the batch; two threads share the larger ones."""
    case = Case(64, 9001, DTYPES, (0, 1, 0), (1.0, 0.5, -1.0), False, False, "none", 4.0, seed=12)
    request = case.request("cpu")
    target_RG, row_id_R = torch.zeros(64, 1, dtype=torch.int64), torch.arange(64)
    whole = everything(request.logits, request.weights, target_RG, row_id_R)
    for size in (1, 2, 3, 8, 31, 33):
        part = everything([l_RV[:size] for l_RV in request.logits], request.weights, target_RG[:size], row_id_R[:size])
        for name in RESULTS:
            assert torch.equal(bits(part, name, slice(None)), bits(whole, name, slice(size))), (size, name)


def test_the_alignment_in_memory_does_not_matter(path):
    vocabulary = 4_500
    case = Case(2, vocabulary, DTYPES, (0, 0, 0), (1.0, 0.5, -1.0), False, False, "none", 4.0, seed=13)
    request = case.request(device(path))
    target_RG = torch.tensor([[1], [2]], device=device(path))
    row_id_R = torch.tensor([4, 5], device=device(path))
    first = everything(request.logits, request.weights, target_RG, row_id_R)
    for shift, padding in ((1, 0), (3, 5), (8, 16)):
        moved = []
        for l_RV in request.logits:
            wide = torch.empty(2, vocabulary + shift + padding, dtype=l_RV.dtype, device=l_RV.device)
            wide[:, shift : shift + vocabulary] = l_RV
            moved.append(wide[:, shift : shift + vocabulary])
        result = everything(moved, request.weights, target_RG, row_id_R)
        for name in RESULTS:
            assert torch.equal(bits(result, name, slice(None)), bits(first, name, slice(None))), name
