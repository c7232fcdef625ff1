"""Properties of the weighted sum of logits, on the CPU path and in Triton."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, FEW_ROUNDINGS, Case, assert_means_the_same, cases, device
from scipy.special import log_softmax

from kernels import describe_flag, fused_logits
from kernels.types import ALL_MASKED, INFINITE, NAN, OVERFLOW

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def run(request, out=None):
    options = {name: getattr(request, name) for name in ("members", "top_k", "targets")}
    return fused_logits(request.logits, request.weights, **options, out=out)


def compare(path, case, data):
    """Any combination of results, for one case."""
    generator = torch.Generator().manual_seed(case.seed)
    targets_BG = torch.randint(-2, case.vocabulary + 2, (case.batch, 3), generator=generator)
    request = case.request(
        device(path),
        members=data.draw(st.booleans()),
        top_k=data.draw(st.sampled_from([k for k in (0, 1, 3, 16, 32) if k <= case.vocabulary])),
        targets=targets_BG if data.draw(st.booleans()) else None,
    )
    assert_means_the_same(request, run(request))


def examples(number):
    return settings(max_examples=number, suppress_health_check=FIXTURES)(given(case=cases(), data=st.data())(compare))


test_every_result_means_what_float64_says = examples(25)
test_every_result_means_what_float64_says_in_many_more_cases = pytest.mark.slow(examples(2000))


@pytest.mark.parametrize("vocabulary", [50_257, pytest.param(262_144, marks=pytest.mark.slow)])
@pytest.mark.parametrize("corner", ["none", "ties", "mask one member", "nan", "3e38"])
def test_whole_vocabularies(path, vocabulary, corner):
    weights, seed = (1.0, -0.5, 2.0), vocabulary + len(corner)
    case = Case(2, vocabulary, DTYPES, (0, 16, 0), weights, False, False, corner, 5.0, seed)
    targets_BG = torch.tensor([[0, vocabulary - 1, 5], [vocabulary, 17, 4096]])
    request = case.request(device(path), members=True, top_k=5, targets=targets_BG)
    assert_means_the_same(request, run(request))


def test_eight_members_and_many_rows(path):
    rows = 1024 if device(path) == "cuda" or path == "cpu" else 17
    weights, padding = tuple((-1.0) ** n * (n + 1) / 4 for n in range(8)), tuple(range(8))
    case = Case(rows, 70, (DTYPES * 3)[:8], padding, weights, True, True, "mask one member", 3.0, seed=8)
    request = case.request(device(path), members=True)
    assert_means_the_same(request, run(request))


@given(case=cases(vocabularies=(1, 7, 1000)))
@settings(max_examples=10, suppress_health_check=FIXTURES)
def test_scipy_agrees_with_the_log_softmax(path, case):
    request = case.request(device(path), targets=torch.arange(case.vocabulary)[None].repeat(case.batch, 1)[:, :64])
    result = run(request)
    for row in torch.nonzero(result.flag == 0)[:, 0].tolist():
        weights_N = request.weights_NB[:, row].double().cpu()
        parts_NV = torch.stack([logits_RV[row].double() for logits_RV in request.logits]).cpu()[weights_N != 0]
        weights_N = weights_N[weights_N != 0]
        x_V = (weights_N[:, None] * parts_NV).sum(dim=0)
        x_V = x_V.masked_fill((parts_NV == -torch.inf).any(dim=0), -torch.inf)
        truth_V = torch.from_numpy(log_softmax(x_V.numpy()))
        size = (weights_N[:, None] * parts_NV).nan_to_num(0, 0, 0).abs().sum(dim=0).max()
        allowed = 2 * (1e-5 + FEW_ROUNDINGS * size)
        ours_G = result.target_logprob[row].cpu()
        theirs_G = truth_V[: len(ours_G)]
        assert (((ours_G - theirs_G).abs() <= allowed) | (ours_G == theirs_G)).all()


def test_sums_have_the_same_bits_on_both_paths(monkeypatch):
    case = Case(3, 9000, DTYPES, (0, 1, 16), (0.3, -1.7, 1e4), True, True, "none", 5.0, seed=3)
    tokens = {}
    for name in ("cpu", "triton"):
        monkeypatch.setenv("COLLAB_KERNELS", name)
        request = case.request(device(name), top_k=16)
        tokens[name] = run(request).top_token.cpu()
    assert torch.equal(tokens["cpu"], tokens["triton"])


@pytest.mark.parametrize(
    ("member", "value", "kind", "words"),
    [
        (1, float("nan"), NAN, "NaN in the logits of S"),
        (0, float("inf"), INFINITE, "+inf in the logits of L"),
        (1, 3e38, OVERFLOW, "the weighted sum leaves float32's range at S"),
        (1, -3e38, OVERFLOW, "the weighted sum leaves float32's range at S"),
    ],
)
def test_a_wrong_value_is_flagged_with_its_member_and_row(path, member, value, kind, words):
    logits = [torch.zeros(3, 5000, device=device(path)) for _ in range(2)]
    logits[member][2, 4500] = value
    result = fused_logits(logits, [1.0, 1.5])
    assert result.flag.tolist() == [0, 0, kind * 16 + member + 1]
    assert result.token.tolist() == [0, 0, -1]
    assert describe_flag(result.flag[2].item(), ["L", "S"]) == words


def test_a_row_without_a_token_is_flagged(path):
    logits = torch.zeros(2, 5000, device=device(path))
    other = torch.zeros(2, 5000, device=device(path))
    logits[1, :2500] = -torch.inf
    other[1, 2500:] = -torch.inf
    result = fused_logits([logits, other], [1.0, -1.0], top_k=2)
    assert result.flag.tolist() == [0, ALL_MASKED * 16]
    assert result.top_token.tolist() == [[0, 1], [-1, -1]]
    assert describe_flag(ALL_MASKED * 16) == "every token is masked"


def test_a_mask_holds_whatever_the_sign_of_the_weight(path):
    logits = torch.zeros(1, 10, device=device(path))
    logits[0, 3] = 5.0
    masking = torch.zeros(1, 10, device=device(path))
    masking[0, 3] = -torch.inf
    for weight in (1.0, -1.0, -1e4):
        result = fused_logits([logits, masking], [1.0, weight], targets=torch.tensor([[3]], device=device(path)))
        assert result.token.item() != 3
        assert result.target_logprob.item() == -torch.inf
        assert result.flag.item() == 0
    logits[0, 3] = 3e38  # an overflow under a mask is no error
    assert fused_logits([logits, logits, masking], [1.0, 1.0, 1.0]).flag.item() == 0


def test_results_are_written_where_they_were(path):
    case = Case(3, 5000, DTYPES, (0, 0, 0), (1.0, 0.5, -1.0), False, False, "none", 3.0, seed=5)
    request = case.request(device(path), members=True, top_k=3)
    first = run(request)
    again = Case(**{**case.__dict__, "seed": 6}).request(device(path), members=True, top_k=3)
    expected = run(again)
    addresses = [first.token.data_ptr(), first.logprob.data_ptr(), first.member_logprob.data_ptr()]
    for _ in range(2):  # twice: a launch must leave the tickets at zero
        result = run(again, out=first)
        assert [result.token.data_ptr(), result.logprob.data_ptr(), result.member_logprob.data_ptr()] == addresses
        for name in ("token", "logprob", "member_logprob", "top_token", "top_logprob"):
            assert torch.equal(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("logits", "weights", "message"),
    [
        ([torch.zeros(2, 5), torch.zeros(2, 6)], [1.0, 1.0], r"member 1 must be \(2, 5\).* found \(2, 6\)"),
        ([torch.zeros(2, 5).double()], [1.0], "float64"),
        ([torch.zeros(5, 2).T], [1.0], "stride"),
        ([torch.zeros(2, 5)] * 9, [1.0] * 9, "1 to 8 members"),
        ([torch.zeros(2, 5)], [0.0], "all be zero"),
        ([torch.zeros(2, 5)] * 2, [[1.0, 0.0], [1.0, 0.0]], "all be zero"),
        ([torch.zeros(2, 5)], [float("nan")], "finite"),
        ([torch.zeros(2, 5)], torch.ones(1, 3), r"\(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(logits, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        fused_logits(logits, weights)
    assert "\n" not in str(error.value)
