"""The weighted sum inside a Triton program, with its corners, and the arithmetic whose result no order can change.

reference.combine is the definition. `rows` are the members' pointers to one row, `weights` their weights, both tuples.
With LEFT_OUT weights may be 0; such a member's logits are not loaded and count as 0.

    N members  C entries of a split  G a few tokens
"""

import triton
import triton.language as tl

from kernels.types import INFINITE, MAX_MEMBERS, NAN, OVERFLOW, Request

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
ROW_SCALE = tl.constexpr(2.0**44)  # units of a whole row's sum, which is at most 2**18: 62 bits
_OVERFLOW, _INFINITE, _NAN = tl.constexpr(OVERFLOW), tl.constexpr(INFINITE), tl.constexpr(NAN)


@triton.jit
def rows_of(
    l0, l1, l2, l3, l4, l5, l6, l7, row64, stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7
):  # fmt: skip
    """Pointers to one row of each member."""
    return (
        l0 + row64 * stride0, l1 + row64 * stride1, l2 + row64 * stride2, l3 + row64 * stride3,
        l4 + row64 * stride4, l5 + row64 * stride5, l6 + row64 * stride6, l7 + row64 * stride7,
    )  # fmt: skip


@triton.jit
def weights_of(weight_N, stride, N: tl.constexpr):
    """The members' weights of one row; after the N-th the first again."""
    w0 = tl.load(weight_N)
    w1 = tl.load(weight_N + (1 if N > 1 else 0) * stride)
    w2 = tl.load(weight_N + (2 if N > 2 else 0) * stride)
    w3 = tl.load(weight_N + (3 if N > 3 else 0) * stride)
    w4 = tl.load(weight_N + (4 if N > 4 else 0) * stride)
    w5 = tl.load(weight_N + (5 if N > 5 else 0) * stride)
    w6 = tl.load(weight_N + (6 if N > 6 else 0) * stride)
    w7 = tl.load(weight_N + (7 if N > 7 else 0) * stride)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def is_used(weight, like):
    """Whether the weight is not 0, in the shape of `like`: a mask with one value for all, so loads stay wide."""
    return tl.full(like.shape, (weight != 0.0).to(tl.int32), tl.int32) != 0


@triton.jit
def load_logits(row, weight, offsets_C, inside_C, MASKED: tl.constexpr, LEFT_OUT: tl.constexpr):
    """A member's logits in float32, 0 outside and where the member is left out."""
    if LEFT_OUT:
        used_C = is_used(weight, offsets_C)
        if MASKED:
            used_C = used_C & inside_C
        logits_C = tl.load(row + offsets_C, mask=used_C, other=0.0)
    elif MASKED:
        logits_C = tl.load(row + offsets_C, mask=inside_C, other=0.0)
    else:
        logits_C = tl.load(row + offsets_C)
    return logits_C.to(tl.float32)


@triton.jit
def weighted_sum(
    rows, weights, offsets_C, inside_C, N: tl.constexpr, MASKED: tl.constexpr, LEFT_OUT: tl.constexpr
):  # fmt: skip
    """x, no corner case looked at; entries outside are 0."""
    for n in tl.static_range(N):
        part_C = load_logits(rows[n], weights[n], offsets_C, inside_C, MASKED, LEFT_OUT)
        if n == 0:
            x_C = part_C * weights[n]
        else:
            x_C = x_C + part_C * weights[n]
    return x_C


@triton.jit
def checked_sum(rows, weights, offsets_C, inside_C, N: tl.constexpr, LEFT_OUT: tl.constexpr):
    """x with masks, -inf where masked or wrong, and a flag code an entry: for a tile with something not finite."""
    masked_C = offsets_C < 0
    for n in tl.static_range(N):
        part_C = load_logits(rows[n], weights[n], offsets_C, inside_C, True, LEFT_OUT)
        masked_C = masked_C | (part_C == float("-inf"))
    x_C = tl.zeros_like(offsets_C).to(tl.float32)
    code_C = tl.zeros_like(offsets_C)
    settled_C = masked_C
    for n in tl.static_range(N):
        part_C = load_logits(rows[n], weights[n], offsets_C, inside_C, True, LEFT_OUT)
        product_C = part_C * weights[n]
        if n == 0:
            x_C = product_C
        else:
            x_C = x_C + product_C
        beyond_C = ((tl.abs(product_C) <= FLOAT32_MAX) & (tl.abs(x_C) <= FLOAT32_MAX)) == 0
        beyond_C = beyond_C & (settled_C == 0)
        settled_C = settled_C | beyond_C
        code_C = tl.where(beyond_C, tl.maximum(code_C, _OVERFLOW * 16 + n + 1), code_C)
        code_C = tl.where(part_C == float("inf"), tl.maximum(code_C, _INFINITE * 16 + n + 1), code_C)
        code_C = tl.where(part_C != part_C, tl.maximum(code_C, _NAN * 16 + n + 1), code_C)
    x_C = tl.where(masked_C | (code_C > 0), float("-inf"), x_C)
    return x_C, code_C


@triton.jit
def x_at(rows, weights, token_G, inside_G, N: tl.constexpr, LEFT_OUT: tl.constexpr):
    """x at a few tokens, -inf where masked."""
    masked_G = inside_G == 0
    for n in tl.static_range(N):
        part_G = load_logits(rows[n], weights[n], token_G, inside_G, True, LEFT_OUT)
        masked_G = masked_G | (part_G == float("-inf"))
        if n == 0:
            x_G = part_G * weights[n]
        else:
            x_G = x_G + part_G * weights[n]
    return tl.where(masked_G, float("-inf"), x_G)


@triton.jit
def exact_sum(values_C, SIZE: tl.constexpr, SCALE: tl.constexpr):
    """Sum of values within [-1, 1] that no order of additions can change."""
    a, b = tl.split(tl.reshape(values_C, (SIZE // 2, 2)))
    a, b = tl.split(tl.reshape(a + b, (SIZE // 4, 2)))
    return tl.sum(((a + b) * SCALE).to(tl.int64), axis=0).to(tl.float32) * (1.0 / SCALE)


@triton.jit
def ordered_key(x):
    """uint32 keys in the order of the floats; -0.0 has that of 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits ^ -2147483648, ~bits).to(tl.uint32, bitcast=True)


def logits_arguments(request: Request) -> tuple:
    """The first arguments of both kernels: logits and strides of eight members (after the N-th the first), weights."""
    logits = request.logits + request.logits[:1] * (MAX_MEMBERS - len(request.logits))
    weights = request.weights
    strides = weights.stride(0), weights.stride(1) if weights.dim() == 2 else 0
    return (*logits, *(logits_RV.stride(0) for logits_RV in logits), weights, *strides)
