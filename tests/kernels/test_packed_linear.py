"""Packed linear layers against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels import PackedLinear
from kernels.cpu.packed_linear import INT8_ROWS, has_float16_product, lossless_dtype, mkl_is_faster, quantize_rows

MKL_IS_FASTER = mkl_is_faster()

# worst |y - float64| over the RMS of y at D = 2,048, as the module's docstring states it
STATED = {"float32": 6e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2}
if not has_float16_product():
    del STATED["float16"]

needs_float16 = pytest.mark.skipif("float16" not in STATED, reason="no product of float16 weights here")


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    """The library that packs float32: both are tried on any processor that has them."""
    if not {"mkl": torch.backends.mkl, "onednn": torch.backends.mkldnn}[request.param].is_available():
        pytest.skip(f"this build has no {request.param}")
    monkeypatch.setattr("kernels.cpu.packed_linear.mkl_is_faster", lambda: request.param == "mkl")
    monkeypatch.setattr("kernels.cpu.packed_linear._STEADY", {})
    return request.param


@pytest.mark.parametrize("dtype", STATED)
@pytest.mark.parametrize("rows", [1, 2, 5, INT8_ROWS, INT8_ROWS + 1, 64])
def test_the_error_stays_within_what_the_docstring_states(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    weight_OD = torch.randn(1024, 2048, generator=generator) / 2048**0.5
    x_RD = torch.randn(rows, 2048, generator=generator)
    truth_RO = x_RD.double() @ weight_OD.double().T
    error = (PackedLinear(weight_OD, dtype=dtype)(x_RD).double() - truth_RO).abs().max()
    assert error <= STATED[dtype] * truth_RO.pow(2).mean().sqrt()


@needs_float16
def test_float16_loses_nothing_of_bfloat16_weights_that_float32_sums_would_show():
    generator = torch.Generator().manual_seed(0)
    weight_OD = (torch.randn(1024, 2048, generator=generator) / 2048**0.5).bfloat16()
    weight_OD[::3] *= 2.0**-12  # among float16's subnormal numbers
    x_RD = torch.randn(16, 2048, generator=generator)
    truth_RO = x_RD.double() @ weight_OD.double().T
    packed = PackedLinear(weight_OD, dtype="float16")
    error = (packed(x_RD).double() - truth_RO).abs().max()
    assert error <= 1e-5 * truth_RO.pow(2).mean().sqrt()
    assert (packed.unpacked() - weight_OD.float()).abs().max() <= 2.0**-25


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.sampled_from((1, 7, 16, 33, 64, 576)),
    outputs=st.sampled_from((1, 3, 16, 65, 200)),
    dtype=st.sampled_from(("auto", *STATED)),
    x_dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_any_shape_and_dtype(shape, inputs, outputs, dtype, x_dtype, bias, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*shape, inputs).to(x_dtype)
    packed = PackedLinear(linear, dtype=dtype)
    y = packed(x)
    assert y.shape == (*shape, outputs)
    assert y.dtype == x_dtype
    truth = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    bound = {"float32": 1e-5, "float16": 3e-3}.get(packed.dtype, 0.06) if x_dtype == torch.float32 else 0.06
    assert ((y.double() - truth).abs() <= bound * (1 + truth.abs())).all()


def test_float32_is_exact_and_read_back_from_either_library_and_the_original_may_go(library):
    linear = nn.Linear(200, 136)
    packed, weight_OD = PackedLinear(linear, dtype="float32"), linear.weight.detach().clone()
    storage = packed._weight
    with torch.no_grad():
        linear.weight.zero_()
    for rows in (1, 3, 16, 65, 200):
        x_RD = torch.randn(rows, 200)
        truth_RO = x_RD.double() @ weight_OD.double().T + linear.bias.double()
        assert packed(x_RD).double() == pytest.approx(truth_RO.detach().numpy(), abs=1e-5)
    assert torch.equal(packed.unpacked(), weight_OD)
    assert packed._weight is storage
    assert not list(packed.parameters())
    assert not packed.state_dict()


def test_auto_loses_nothing(monkeypatch):
    weight = torch.randn(32, 64)
    assert PackedLinear(weight).dtype == "float32"
    assert PackedLinear(weight.bfloat16()).dtype == lossless_dtype(torch.bfloat16)
    for instructions, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("kernels.cpu.packed_linear.has_bfloat16_instructions", lambda found=instructions: found)
        assert lossless_dtype(torch.bfloat16) == expected
        assert lossless_dtype(torch.float16) == lossless_dtype(torch.float32) == "float32"


def test_quantized_rows_are_within_half_a_step():
    weight_OD = torch.randn(50, 300)
    weight_OD[7] = 0
    quantized_OD, scale_O = quantize_rows(weight_OD)
    # the scale is rounded to bf16, by at most 2**-9 of it: the largest entry may be cut by 127 times that
    error_OD = (quantized_OD.double() * scale_O.double()[:, None] - weight_OD.double()).abs()
    assert (error_OD <= scale_O.double()[:, None] * (0.5 + 127 * 2.0**-8)).all()
    assert (error_OD.median(dim=1).values <= scale_O.double() * 0.5).all()


@pytest.mark.parametrize("dtype", STATED)
def test_what_does_not_fit_is_refused(library, dtype):
    with pytest.raises(ValueError, match="float64"):
        PackedLinear(torch.ones(2, 2), dtype="float64")
    with pytest.raises(ValueError, match=r"\(O, D\)"):
        PackedLinear(torch.ones(2), dtype=dtype)
    for value, named in ((-7e4, "70000"), (float("nan"), "nan"), (float("inf"), "inf")) if dtype == "float16" else ():
        with pytest.raises(ValueError, match=f"over 65,504, found {named}; use float32"):
            PackedLinear(torch.tensor([[1.0, value]]), dtype=dtype)
    packed = PackedLinear(torch.ones(8, 16), dtype=dtype)
    for shape in ((4, 8), (4, 17), (2, 2, 4)):
        with pytest.raises(ValueError, match=r"x must be \(..., 16\), found"), torch.no_grad():
            packed(torch.ones(*shape))


@pytest.mark.parametrize("dtype", STATED)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (576, 1536), (1536, 576), (2048, 512), (40, 24)])
def test_an_invariant_layers_rows_keep_their_bits_in_any_number(library, dtype, inputs, outputs):
    if library == "mkl" and not MKL_IS_FASTER:
        pytest.skip("with AVX2 MKL's sums depend on the number of rows, so it is not used there")
    generator = torch.Generator().manual_seed(0)
    weight_OD = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    packed = PackedLinear(weight_OD, torch.randn(outputs, generator=generator), dtype=dtype, invariant=True)
    x_RD = torch.randn(150, inputs, generator=generator)
    whole_RO = packed(x_RD)
    for first, last in [(0, 1), (149, 150), (3, 5), (10, 17), (20, 37), (0, 64), (60, 130)]:
        rows = slice(first, last)
        assert torch.equal(packed(x_RD[rows]), whole_RO[rows])
