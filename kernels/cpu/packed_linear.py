"""Linear layers for decoding on a CPU: the weight is brought once into the form that the processor reads fastest.

`F.linear` takes 2 to 4 times as long at batches of 2 to 16: it copies blocks of the weight into the library's order at
every call. y = x Wᵀ + b in four weight dtypes:

| dtype | weight | matmul | max |y - float64| over the RMS of y, D = 2,048 |
|---|---|---|---|
| float32 | packed, by MKL or oneDNN: `mkl_is_faster` | float32: exact up to the order of additions | 6e-6 |
| float16 | packed by FBGEMM | float16 x float32 into float32 | 2e-3; of bfloat16 weights 1e-5 |
| bfloat16 | packed by oneDNN, or plain without the instructions | bf16 x bf16 into float32, result in bf16 | 2e-2 |
| int8 | plain, one scale an output row | int8 x bf16 into float32, result in bf16 | 4e-2 |

(normal weights and inputs; with the rounding of the weights.) float16 holds every bfloat16 number from 2^-17 to 65,504
exactly and smaller ones within 2^-25. How a call is computed depends on the weight dtype and the number of rows only.

With `invariant=True` a row's bits do not depend on the other rows either. For FBGEMM that is always so; MKL and oneDNN
add in one order for any number of rows from two on, so a lone row gets a second one. The numbers of rows for which that
holds are found by trying, once for each shape, when the layer is packed.

    D inputs  O outputs  R rows (all leading dimensions of x together)
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")

# The number of rows that the packed layout is made for: of those tried the fastest from 1 to 64 rows, AVX-512 and AVX2.
EXPECTED_ROWS = 64
# Up to here the int8 matmul is the fastest. With D not a multiple of 16 it was seen to run past the end of a row.
INT8_ROWS, INT8_VECTOR = 16, 16
# With AVX-512 oneDNN is faster for 4 rows than for 1 to 3 (SmolLM2's matmuls, one core: 31 ms against 38, 45 and 43).
AVX512_LEAST_ROWS = 4
# oneDNN keeps a compiled matmul, some 0.2 MB, for every number of rows: beyond so many it is a multiple of 4.
EVERY_ROWS, ROWS_MULTIPLE = 16, 4
# Without bf16 instructions PyTorch's bf16 matmul is emulated: it is faster only while reading the weight dominates.
PLAIN_BFLOAT16_ROWS = 2
# Numbers of rows that are tried for `invariant`; more rows are split by the last. Where no range down to TILE_ROWS
# agrees, every matmul has exactly TILE_ROWS, padded.
TRIED_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 33, 48, 63, 64)
TILE_ROWS = 16
# Output rows that are converted to float32 at once: 2 MB of them at D = 2,048, what a core's L2 holds.
BLOCK_ELEMENTS = 1 << 19

# (dtype, outputs, inputs, threads) -> what `_steady_rows` found
_STEADY: dict[tuple[str, int, int, int], tuple[int, int]] = {}
_TRYING = threading.Lock()  # layers may be packed on several threads


@functools.cache
def has_bfloat16_instructions() -> bool:
    """Whether oneDNN multiplies packed bf16 weights by instructions for them: tried, since it can be switched off."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    try:
        weight_OD = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=torch.bfloat16), EXPECTED_ROWS)
        _onednn_matmul(weight_OD, None, torch.ones(2, 16, dtype=torch.bfloat16))
    except RuntimeError:  # how oneDNN refuses; then the weight stays plain
        return False
    return True


@functools.cache
def has_float16_product() -> bool:
    """Whether PyTorch multiplies packed float16 weights: by FBGEMM, if it is `torch.backends.quantized.engine`."""
    try:
        _fbgemm_matmul(torch.ops.quantized.linear_prepack_fp16(torch.ones(8, 8), None), torch.ones(1, 8))
    except (RuntimeError, NotImplementedError):
        return False
    return True


@functools.cache
def mkl_is_faster() -> bool:
    """Whether MKL reads its packed float32 weights faster than oneDNN its own: so measured on an Intel processor with
    AVX-512 (a SmolLM2 step's matmuls at 1, 4, 16 rows, one core: 51, 60, 87 ms against 65, 67, 98). With AVX2 its sums
    depend on the number of rows.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)
    except OSError:
        return False


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU, without gradients.

    linear: an `nn.Linear`, or a weight (O, D) with `bias` (O,), copied.   dtype: of the weight, one of `DTYPES`.
    x: (..., D) of any float dtype; the result (..., O) has x's dtype.   invariant: rows do not depend on each other.
    Raises ValueError for an unknown dtype, a weight that is not 2-dimensional, not on the CPU or too large for float16,
    and an x of another width.
    """

    def __init__(
        self, linear: nn.Linear | Tensor, bias: Tensor | None = None, *, dtype: str = "auto", invariant: bool = False
    ) -> None:
        super().__init__()
        weight_OD = (linear.weight if isinstance(linear, nn.Linear) else linear).detach()
        bias = linear.bias if isinstance(linear, nn.Linear) else bias
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
        if weight_OD.dim() != 2 or weight_OD.device.type != "cpu":
            raise ValueError(f"weight must be (O, D) on the CPU, found {tuple(weight_OD.shape)} on {weight_OD.device}")
        if dtype == "auto":
            dtype = lossless_dtype(weight_OD.dtype)
        if dtype == "float16" and not has_float16_product():
            engine = torch.backends.quantized.engine
            raise ValueError(f"float16 weights: PyTorch has no matmul for them here (engine {engine}); use float32")
        if dtype == "float16" and weight_OD.numel():
            largest = torch.stack(weight_OD.aminmax()).abs().max()
            if not largest <= torch.finfo(torch.float16).max:  # NaN too
                raise ValueError(f"float16 holds no weight over 65,504, found {largest:g}; use float32")
        self.dtype = dtype
        self.out_features, self.in_features = weight_OD.shape
        self._weight: Any  # not a buffer: the libraries' opaque tensors cannot be moved, cast or saved
        self._scale_O: Tensor | None = None
        self._bias_O = None if bias is None else bias.detach().float()
        self._packed_matmul: Callable[[Tensor], Tensor] | None = None
        self._own: torch.dtype | None = None  # the dtype of x that `_packed_matmul` takes
        self._least_rows, self._multiple = 1, 1
        if dtype == "float16":
            self._weight = torch.ops.quantized.linear_prepack_fp16(weight_OD.float().contiguous(), self._bias_O)
            self._packed_matmul, self._own = functools.partial(_fbgemm_matmul, self._weight), torch.float32
        elif dtype == "float32" and mkl_is_faster():
            self._weight = torch.ops.mkl._mkl_reorder_linear_weight(weight_OD.float().contiguous(), EXPECTED_ROWS)
            shape_OD = weight_OD.new_zeros((), dtype=torch.float32).expand(weight_OD.shape)  # asked for its sizes
            self._packed_matmul = functools.partial(_mkl_matmul, self._weight, shape_OD, self._bias_O)
            self._own = torch.float32
        elif dtype == "float32" or (dtype == "bfloat16" and has_bfloat16_instructions()):
            self._pack_with_onednn(weight_OD.to(getattr(torch, dtype)))
        elif dtype == "bfloat16":
            self._weight = weight_OD.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        else:
            self._weight, self._scale_O = quantize_rows(weight_OD)
        self.invariant = invariant
        self._most_rows = TRIED_ROWS[-1]
        if invariant:
            key = (dtype, self.out_features, self.in_features, torch.get_num_threads())
            with _TRYING:
                if key not in _STEADY:
                    _STEADY[key] = self._steady_rows()
            least, self._most_rows = _STEADY[key]
            self._least_rows = max(least, self._least_rows)

    def _pack_with_onednn(self, weight_OD: Tensor) -> None:
        """A build without oneDNN keeps the weight plain."""
        self._own = weight_OD.dtype
        bias_O = None if self._bias_O is None else self._bias_O.to(weight_OD.dtype)
        if not torch.backends.mkldnn.is_available():
            self._weight = weight_OD.contiguous().clone()
            self._packed_matmul = functools.partial(F.linear, weight=self._weight, bias=bias_O)
            return
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), EXPECTED_ROWS)
        self._packed_matmul = functools.partial(_onednn_matmul, self._weight, bias_O)
        self._multiple = ROWS_MULTIPLE
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            self._least_rows = AVX512_LEAST_ROWS

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one call reads."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]
        return self.out_features * self.in_features * itemsize

    def unpacked(self) -> Tensor:
        """The weight (O, D): float32 for float32 and float16, else bfloat16; if stored plain, the stored tensor."""
        if self._scale_O is not None:
            return (self._weight.float() * self._scale_O.float()[:, None]).bfloat16()
        if self.dtype == "float16":
            return torch.ops.quantized.linear_unpack_fp16(self._weight)[0]
        if not self._weight.is_mkldnn:
            return self._weight
        if self.dtype != "float32" or not mkl_is_faster():
            return self._weight.to_dense()
        # MKL cannot unpack: its matmuls with unit vectors are the columns of the weight, exactly.
        weight_OD = torch.empty(self.out_features, self.in_features)
        shape_OD = weight_OD[:1, :1].expand(weight_OD.shape)
        for start in range(0, self.in_features, EXPECTED_ROWS):
            unit_RD = torch.zeros(min(EXPECTED_ROWS, self.in_features - start), self.in_features)
            unit_RD[:, start:].fill_diagonal_(1.0)
            weight_OD[:, start : start + EXPECTED_ROWS] = _mkl_matmul(self._weight, shape_OD, None, unit_RD).t()
        return weight_OD

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        if x.shape[-1] != self.in_features:  # MKL would not ask
            raise ValueError(f"x must be (..., {self.in_features}), found {tuple(x.shape)}")
        # A step makes hundreds of these calls.
        if x.dtype == self._own and x.dim() == 2 and self._fits(x.shape[0]) and not torch.is_grad_enabled():
            return self._packed_matmul(x)  # type: ignore[misc]  # there is one where there is an own type
        with torch.no_grad():
            x_RD = x.reshape(-1, self.in_features)
            if x_RD.shape[0] <= self._most_rows or not self.invariant:
                y_RO = self._padded(x_RD)
            else:
                y_RO = torch.cat([self._padded(part_RD) for part_RD in x_RD.split(self._most_rows)])
            return y_RO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _fits(self, rows: int) -> bool:
        """Whether a matmul of so many rows needs no padding."""
        if self.invariant and rows > self._most_rows:
            return False
        return rows >= self._least_rows and (rows <= EVERY_ROWS or rows % self._multiple == 0)

    def fitting_rows(self, rows: int) -> int:
        """The least number of rows, at least so many, whose matmul needs no padding."""
        if self._fits(rows) or (self.invariant and rows > self._most_rows):
            return rows
        return rows + (max(self._least_rows - rows, 0) or -rows % self._multiple)

    def _padded(self, x_RD: Tensor) -> Tensor:
        """The matmul, with rows of zeros appended where it needs them."""
        rows = x_RD.shape[0]
        missing = self.fitting_rows(rows) - rows
        return self._matmul(F.pad(x_RD, (0, 0, 0, missing)))[:rows] if missing else self._matmul(x_RD)

    def _matmul(self, x_RD: Tensor) -> Tensor:
        if self._packed_matmul is not None:
            return self._packed_matmul(x_RD.to(self._own))
        if self._scale_O is not None and self._fits_int8_matmul(x_RD.shape[0]):
            # with float32 activations this operation is 5 to 40 times slower
            y_RO = torch._weight_int8pack_mm(x_RD.bfloat16(), self._weight, self._scale_O)
            return y_RO if self._bias_O is None else y_RO + self._bias_O
        if self.dtype == "bfloat16" and x_RD.shape[0] <= PLAIN_BFLOAT16_ROWS and not self.invariant:
            bias_O = None if self._bias_O is None else self._bias_O.bfloat16()
            return F.linear(x_RD.bfloat16(), self._weight, bias_O)
        return self._block_by_block(x_RD.float())

    def _fits_int8_matmul(self, rows: int) -> bool:
        return rows <= INT8_ROWS and self.in_features % INT8_VECTOR == 0

    def _steady_rows(self) -> tuple[int, int]:
        """The least and most rows of a matmul between which a row's bits do not depend on their number."""
        most = INT8_ROWS if self._scale_O is not None and self._fits_int8_matmul(INT8_ROWS) else TRIED_ROWS[-1]
        x_RD = torch.randn(most, self.in_features, generator=torch.Generator().manual_seed(0))
        whole = self._matmul(x_RD)
        least = most
        for rows in sorted((rows for rows in TRIED_ROWS if rows < most), reverse=True):
            parts = slice(None, rows), slice(-rows, None)
            if not all(torch.equal(self._matmul(x_RD[part]), whole[part]) for part in parts):
                break
            least = rows
        if self.dtype not in ("float32", "float16"):
            least = max(least, 2)  # results in bf16 show another order of additions too seldom to rely on
        return (least, most) if least <= TILE_ROWS else (TILE_ROWS, TILE_ROWS)

    def _block_by_block(self, x_RD: Tensor) -> Tensor:
        """float32 matmul over blocks of the weight that are converted to float32 in cache."""
        x_DR = x_RD.t()
        y_OR = torch.empty(self.out_features, x_RD.shape[0])
        rows = max(1, BLOCK_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, rows):
            torch.mm(self._weight[start : start + rows].float(), x_DR, out=y_OR[start : start + rows])
        if self._scale_O is not None:
            y_OR *= self._scale_O.float()[:, None]
        if self._bias_O is not None:
            y_OR += self._bias_O[:, None]
        return y_OR.t().contiguous()


def quantize_rows(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (O, D) and scale (O,) bfloat16 with weight = int8 * scale, the largest entry of a row at 127."""
    weight_OD = weight_OD.float()
    scale_O = (weight_OD.abs().amax(dim=1) / 127).clamp_min(1e-30).bfloat16()
    quantized_OD = (weight_OD / scale_O.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return quantized_OD, scale_O


def lossless_dtype(dtype: torch.dtype) -> str:
    """Of the weight dtypes that lose nothing of such weights and pack at once, the one that is read fastest."""
    return "bfloat16" if dtype == torch.bfloat16 and has_bfloat16_instructions() else "float32"


def _onednn_matmul(weight: Tensor, bias_O: Tensor | None, x_RD: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x_RD, weight, bias_O, "none", [], "")  # no activation


def _mkl_matmul(weight: Tensor, shape_OD: Tensor, bias_O: Tensor | None, x_RD: Tensor) -> Tensor:
    """shape_OD: any tensor of the plain weight's shape."""
    return torch.ops.mkl._mkl_linear.default(x_RD, weight, shape_OD, bias_O, x_RD.shape[0])


def _fbgemm_matmul(weight: Any, x_RD: Tensor) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16.default(x_RD, weight)
