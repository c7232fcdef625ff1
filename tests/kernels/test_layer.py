"""The kernels between the matmuls of a layer on a GPU, and the matmuls of one row, against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
layer = pytest.importorskip("kernels.triton.layer")
row = pytest.importorskip("kernels.triton.gemv")

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
RAN = "GPU" if WHERE == "cuda" else "interpreter"
pytestmark = [pytest.mark.gpu] if WHERE == "cuda" else []
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
HEADS = st.sampled_from(((4, 2), (9, 3), (1, 1)))  # of queries, of keys
QUICK = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(WHERE, dtype)


def close(found, expected, dtype, within=(3e-6, 2**-7)):
    """Within a few roundings of what was written."""
    allowed = within[dtype == torch.bfloat16]
    torch.testing.assert_close(found.double(), expected, rtol=allowed, atol=allowed)


def normed(x_RD, scale_D):
    """In float64."""
    return x_RD.double() / (x_RD.double().square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * scale_D.double()


def assert_cached(entries_PJ, before_PJ, slot_R, expected_RJ, check, dtype):
    """These slots hold what is expected, and the others what they held before."""
    check(entries_PJ[slot_R], expected_RJ, dtype)
    others = [slot for slot in range(len(entries_PJ)) if slot not in slot_R.tolist()]
    assert torch.equal(entries_PJ[others], before_PJ[others])


@QUICK
@given(st.integers(1, 5), st.sampled_from((1, 16, 33, 576)), DTYPES, st.booleans(), st.integers(0, 10**6))
def test_a_norm_includes_the_addition_before_it(rows, width, dtype, adds, seed):
    stream_RE, scale_D = normal(seed, rows, width + 16), normal(seed + 1, width)
    delta_RD = normal(seed + 2, rows, width, dtype=dtype) if adds else None
    expected_RD = stream_RE[:, :width].double() + (delta_RD.double() if adds else 0.0)
    tail = stream_RE[:, width:].clone()
    found_RD = layer.add_rms_norm(stream_RE[:, :width], scale_D, 1e-5, dtype, delta_RD)
    close(stream_RE[:, :width], expected_RD, torch.float32)
    assert torch.equal(stream_RE[:, width:], tail)
    assert found_RD.dtype == dtype
    close(found_RD, normed(expected_RD, scale_D), dtype)


@QUICK
@given(st.integers(1, 5), HEADS, st.sampled_from((2, 10, 64)), DTYPES, st.integers(0, 10**6))
def test_queries_and_keys_are_rotated_and_cached(rows, heads, width, dtype, seed):
    queries, keys = heads
    qkv_RO = normal(seed, rows, (queries + 2 * keys) * width, dtype=dtype)
    angle_RC = normal(seed + 1, rows, width // 2) * 30
    rope_RHC = torch.polar(torch.ones_like(angle_RC), angle_RC)[:, None].expand(-1, queries + keys, -1).contiguous()
    slot_R = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:rows].to(WHERE)
    entries_PJ = normal(seed + 2, 9, 2 * keys * width, dtype=dtype)
    before_PJ = entries_PJ.clone()
    query_RQ = layer.rope_and_cache(qkv_RO, rope_RHC, slot_R, entries_PJ, queries, keys)
    pairs_RHC = torch.view_as_complex(qkv_RO.double().view(rows, -1, width // 2, 2))
    rotated_RHC = pairs_RHC[:, : queries + keys] * rope_RHC.to(torch.complex128)
    whole_RHC = torch.cat((rotated_RHC, pairs_RHC[:, queries + keys :]), dim=1)
    expected_RO = torch.view_as_real(whole_RHC).flatten(1)
    assert query_RQ.dtype == dtype
    close(query_RQ, expected_RO[:, : queries * width], dtype)
    assert_cached(entries_PJ, before_PJ, slot_R, expected_RO[:, queries * width :], close, dtype)


@QUICK
@given(st.integers(1, 5), st.sampled_from((1, 48, 2048, 3001)), DTYPES, st.integers(0, 10**6))
def test_the_gate_is_multiplied(rows, width, dtype, seed):
    gate_RF, up_RF = normal(seed, rows, width, dtype=dtype) * 20, normal(seed + 1, rows, width, dtype=dtype)
    found_RF = layer.silu_and_mul(torch.cat((gate_RF, up_RF), dim=1))
    assert found_RF.dtype == dtype
    close(found_RF, torch.nn.functional.silu(gate_RF.double()) * up_RF.double(), dtype)


def near(found, expected, dtype):
    """Within the roundings of sums of some hundred products, of numbers near one."""
    close(found, expected, dtype, (2e-4, 2e-2))


@QUICK
@given(st.sampled_from((5, 64, 576, 1100)), st.sampled_from((1, 6, 130)), DTYPES, st.booleans(), st.integers(0, 10**6))
def test_one_row_of_a_linear_layer(inputs, outputs, dtype, bias, seed):
    x_1D = normal(seed, 1, inputs, dtype=dtype)
    weight_OD = normal(seed + 1, outputs, inputs, dtype=dtype) * inputs**-0.5
    bias_O = normal(seed + 2, outputs, dtype=dtype) if bias else None
    expected_1O = x_1D.double() @ weight_OD.double().T + (bias_O.double() if bias else 0.0)
    found_1O = row.gemv(x_1D, weight_OD, bias_O)
    assert found_1O.dtype == dtype
    near(found_1O, expected_1O, dtype)
    stream_1E = normal(seed + 3, 1, outputs + 16)
    before_1E = stream_1E.clone()
    row.gemv(x_1D, weight_OD, bias_O, add_to=stream_1E[:, :outputs])
    near(stream_1E[:, :outputs], before_1E[:, :outputs].double() + expected_1O, dtype)
    assert torch.equal(stream_1E[:, outputs:], before_1E[:, outputs:])


@QUICK
@given(st.sampled_from((64, 576, 1100)), st.sampled_from((2, 12, 134)), DTYPES, st.booleans(), st.integers(0, 10**6))
def test_one_row_is_normed_and_gated(inputs, width, dtype, bias, seed):
    x_1D, scale_D = normal(seed, 1, inputs), normal(seed + 1, inputs)
    weight_OD = normal(seed + 2, 2 * width, inputs, dtype=dtype) * inputs**-0.5
    bias_O = normal(seed + 3, 2 * width, dtype=dtype) if bias else None
    h_1D = normed(x_1D, scale_D)
    gate_1F, up_1F = (h_1D @ weight_OD.double().T + (bias_O.double() if bias else 0.0)).chunk(2, dim=1)
    found_1F = row.gemv(x_1D, weight_OD, bias_O, norm=row.NormBefore(scale_D, 1e-5), gated=True)
    near(found_1F, torch.nn.functional.silu(gate_1F) * up_1F, dtype)


@QUICK
@given(HEADS, st.sampled_from((2, 10, 64)), DTYPES, st.integers(0, 10**6))
def test_one_rows_queries_and_keys_are_rotated_and_cached(heads, width, dtype, seed):
    queries, keys = heads
    x_1D, scale_D = normal(seed, 1, 96), normal(seed + 1, 96)
    weight_OD = normal(seed + 2, (queries + 2 * keys) * width, 96, dtype=dtype) * 0.1
    angle_C = normal(seed + 3, width // 2) * 30
    entries_PJ = normal(seed + 4, 9, 2 * keys * width, dtype=dtype)
    before_PJ = entries_PJ.clone()
    slot_1 = torch.tensor([seed % 9], device=WHERE)
    rope = row.RopeAfter(torch.stack((angle_C.cos(), angle_C.sin()), dim=1), slot_1, entries_PJ, queries, keys)
    query_1Q = row.gemv(x_1D, weight_OD, norm=row.NormBefore(scale_D, 1e-5), rope=rope)
    pairs_HC = torch.view_as_complex((normed(x_1D, scale_D) @ weight_OD.double().T).view(-1, width // 2, 2))
    rope_C = torch.polar(torch.ones_like(angle_C), angle_C).to(torch.complex128)
    pairs_HC = torch.cat((pairs_HC[: queries + keys] * rope_C, pairs_HC[queries + keys :]))
    expected_O = torch.view_as_real(pairs_HC).flatten()
    near(query_1Q[0], expected_O[: queries * width], dtype)
    assert_cached(entries_PJ, before_PJ, slot_1, expected_O[None, queries * width :], near, dtype)


def test_a_rows_bits_do_not_depend_on_the_others():
    stream_RD, scale_D = normal(0, 7, 576), normal(1, 576)
    qkv_RO, gate_RF = normal(2, 7, 5 * 64), normal(3, 7, 300)
    angle_RC = normal(4, 7, 32)
    rope_RHC = torch.polar(torch.ones_like(angle_RC), angle_RC)[:, None].expand(-1, 4, -1).contiguous()
    slot_R = torch.arange(7, device=WHERE)

    def results(rows):
        entries_PJ = torch.zeros(7, 2 * 64, device=WHERE)
        query_RQ = layer.rope_and_cache(qkv_RO[rows], rope_RHC[rows], slot_R[rows], entries_PJ, 3, 1)
        silu_RF = layer.silu_and_mul(gate_RF[rows])
        return layer.add_rms_norm(stream_RD[rows], scale_D, 1e-6, torch.float32), query_RQ, entries_PJ[rows], silu_RF

    together = results(slice(None))
    for row in range(7):
        for alone, among in zip(results(slice(row, row + 1)), together):
            assert torch.equal(alone[0], among[row])
