"""philox.py in Triton, to the bit: random words and Gumbel noise inside a program. Nothing is launched from here."""

import triton
import triton.language as tl

from kernels.philox import KEY_STEPS, ROUND_MULTIPLIERS, ROUNDS

_MULTIPLIER0, _MULTIPLIER1 = tl.constexpr(ROUND_MULTIPLIERS[0]), tl.constexpr(ROUND_MULTIPLIERS[1])
_KEY_STEP0, _KEY_STEP1 = tl.constexpr(KEY_STEPS[0]), tl.constexpr(KEY_STEPS[1])
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def random_words(seed, row_id, position, start, SIZE: tl.constexpr):
    """One 32-bit word an entry: philox.py in Triton."""
    c0 = (start // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + row_id.to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    multiplier0 = tl.zeros_like(c0) + tl.full((), _MULTIPLIER0, tl.uint32)
    multiplier1 = tl.zeros_like(c0) + tl.full((), _MULTIPLIER1, tl.uint32)
    step0 = tl.full((), _KEY_STEP0, tl.uint32)
    step1 = tl.full((), _KEY_STEP1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, high1 = tl.umulhi(c0, multiplier0), tl.umulhi(c2, multiplier1)
        low0, low1 = c0 * multiplier0, c2 * multiplier1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + step0
        k1 = k1 + step1
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (SIZE,))


@triton.jit
def gumbel(words):
    """Standard Gumbel noise, as philox.gumbel in float32."""
    u = (words.to(tl.float32) + 0.5) * (2.0**-32)
    u = tl.minimum(u, 1 - 2.0**-24)
    exponential = tl.where(u < 2.0**-12, u * (1 + u * (0.5 + u * (1 / 3))), -tl.log(1 - u))
    return -tl.log(exponential)
