"""min-p, top-k and top-p as one threshold for each row of logits. The twin is `layers.sampler.least_kept`.

A threshold is the largest number such that the tokens at or above it reach a count, or a mass. It is searched on the
floats' bits, whose order as integers is the floats', three pivots to a pass over the row, one program to a row: no sort,
and nothing that depends on the order in which threads come.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
UNUSED_BITS = {
    torch.float32: 0,
    torch.float16: 13,
    torch.bfloat16: 16,
}  # of their values in float32, always 0


def least_kept(logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
    """As the twin: the lowest logit that each row keeps, float32 [S]."""
    num_rows, vocab_size = logits.shape
    least = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    least_kept_kernel[(num_rows,)](
        logits, logits.stride(0), vocab_size, rows, sampling, least,
        SHIFT=UNUSED_BITS[logits.dtype], BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return least


@triton.jit
def to_key(x, SHIFT: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def to_float(key, SHIFT: tl.constexpr):
    key = key << SHIFT
    if key < 0:
        key += (1 << SHIFT) - 1
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weigh(
    logits,
    vocab_size,
    highest,
    sharpness,
    a,
    b,
    c,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Of the tokens whose keys are at or above a, b and c, the numbers or the masses."""
    lane = tl.arange(0, BLOCK)
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b = tl.zeros([BLOCK], tl.float32)
    above_c = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        key = to_key(x, SHIFT)
        weight = tl.where(x > float("-inf"), 1.0, 0.0)
        if BY_MASS:
            weight = tl.exp((x - highest) * sharpness)
        above_a += tl.where(key >= a, weight, 0.0)
        above_b += tl.where(key >= b, weight, 0.0)
        above_c += tl.where(key >= c, weight, 0.0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def search(
    logits, vocab_size, highest, sharpness, low, high, target,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at which the weight reaches `target`; low if none does."""
    while high - low > 1:
        span = high - low
        a = low + tl.maximum(span // 4, 1)
        b = low + tl.maximum(span // 2, 1)
        c = low + tl.maximum(span - span // 4 - 1, 1)
        at_a, at_b, at_c = weigh(logits, vocab_size, highest, sharpness, a, b, c, SHIFT, BLOCK, BY_MASS)
        high = tl.where(at_a < target, a, tl.where(at_b < target, b, tl.where(at_c < target, c, high)))
        low = tl.where(at_c >= target, c, tl.where(at_b >= target, b, tl.where(at_a >= target, a, low)))
    return low


@triton.jit
def least_kept_kernel(
    logits, stride, vocab_size, rows, sampling, least, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    logits += s * stride
    params = sampling + tl.load(rows + s) * 6
    temperature = tl.load(params).to(tl.float32, bitcast=True)
    top_p = tl.load(params + 1).to(tl.float32, bitcast=True)
    min_p = tl.load(params + 2).to(tl.float32, bitcast=True)
    top_k = tl.load(params + 3)
    threshold = float("-inf")
    if (temperature > 0) & ((top_k < vocab_size) | (top_p < 1) | (min_p > 0)):
        sharpness = 1 / tl.maximum(temperature, 1e-30)
        lane = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(logits + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(
                tl.float32
            )
            best = tl.maximum(best, x)
        highest = tl.max(best, 0)
        worst = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(logits + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(
                tl.float32
            )
            alive = (x > float("-inf")) & (tl.exp((x - highest) * sharpness) >= min_p)
            worst = tl.where(alive, tl.minimum(worst, x), worst)
        low = to_key(tl.min(worst, 0), SHIFT)
        high = to_key(highest, SHIFT) + 1
        if top_k < vocab_size:
            low = search(logits, vocab_size, highest, sharpness, low, high, top_k, SHIFT, BLOCK, False)
        if top_p < 1:
            total, _, _ = weigh(logits, vocab_size, highest, sharpness, low, low, low, SHIFT, BLOCK, True)
            low = search(logits, vocab_size, highest, sharpness, low, high, top_p * total, SHIFT, BLOCK, True)
        threshold = to_float(low, SHIFT)
    tl.store(least + s, threshold)
