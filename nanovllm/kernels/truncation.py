"""min-p, top-k and top-p as one threshold for each row of logits. The twin is `layers.sampler.least_kept`.

The threshold is such that the tokens at or above it reach a count, or a mass. It is searched on the floats' bits, whose
order as integers is the floats', three pivots to a pass over the row, one program to a row: no sort, and nothing that
depends on the order in which threads come.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of their values in float32, always 0


def least_kept(logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
    """As the twin, float32 [S]; a threshold may lie between the lowest logit that is kept and the next one below."""
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
def load(logits, start, vocab_size, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    return tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def weigh(logits, vocab_size, highest, sharpness, a, b, c, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """Of the tokens at or above a, b and c, which are finite, the numbers or the masses."""
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b = tl.zeros([BLOCK], tl.float32)
    above_c = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = load(logits, start, vocab_size, BLOCK)
        weight = 1.0
        if BY_MASS:
            weight = tl.exp((x - highest) * sharpness)
        above_a += tl.where(x >= a, weight, 0.0)
        above_b += tl.where(x >= b, weight, 0.0)
        above_c += tl.where(x >= c, weight, 0.0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def search(
    logits, vocab_size, highest, sharpness, low, high, target,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at which the weight reaches `target`, or one that keeps the same; low if none."""
    while high - low > 1:
        span = high - low
        a = low + tl.maximum(span // 4, 1)
        b = low + tl.maximum(span // 2, 1)
        c = low + tl.maximum(span - span // 4 - 1, 1)
        at_a, at_b, at_c = weigh(
            logits, vocab_size, highest, sharpness,
            to_float(a, SHIFT), to_float(b, SHIFT), to_float(c, SHIFT), BLOCK, BY_MASS,
        )  # fmt: skip
        high = tl.where(at_a < target, a, tl.where(at_b < target, b, tl.where(at_c < target, c, high)))
        low = tl.where(at_c >= target, c, tl.where(at_b >= target, b, tl.where(at_a >= target, a, low)))
        if not BY_MASS:  # noqa: SIM102 (known when it is compiled)
            if (at_a == target) | (at_b == target) | (at_c == target):
                high = low  # exactly so many: nothing between them and the next one matters
    return low


@triton.jit
def kth_key(x, k, low, high, SHIFT: tl.constexpr):
    """The key of the k-th largest of x, which are in registers; low if they are fewer."""
    while high - low > 1:
        middle = low + (high - low) // 2
        reaches = tl.sum((x >= to_float(middle, SHIFT)).to(tl.int32), 0) >= k
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
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
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        worst = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = load(logits, start, vocab_size, BLOCK)
            best = tl.maximum(best, x)
            worst = tl.minimum(worst, tl.where(x > float("-inf"), x, float("inf")))
        highest = tl.max(best, 0)
        if min_p > 0:
            worst = tl.full([BLOCK], float("inf"), tl.float32)
            for start in range(0, vocab_size, BLOCK):
                x = load(logits, start, vocab_size, BLOCK)
                alive = (x > float("-inf")) & (tl.exp((x - highest) * sharpness) >= min_p)
                worst = tl.minimum(worst, tl.where(alive, x, float("inf")))
        low = to_key(tl.min(worst, 0), SHIFT)
        high = to_key(highest, SHIFT) + 1
        if top_k < vocab_size:
            # The k-th largest of the columns' maxima is not above the k-th largest of all, and hardly below it.
            low = kth_key(best, top_k, low, high, SHIFT)
            floor = to_float(low, SHIFT)
            count, _, _ = weigh(logits, vocab_size, highest, sharpness, floor, floor, floor, BLOCK, False)
            if count > top_k:
                low = search(logits, vocab_size, highest, sharpness, low, high, top_k, SHIFT, BLOCK, False)
        if top_p < 1:
            floor = to_float(low, SHIFT)
            total, _, _ = weigh(logits, vocab_size, highest, sharpness, floor, floor, floor, BLOCK, True)
            low = search(logits, vocab_size, highest, sharpness, low, high, top_p * total, SHIFT, BLOCK, True)
        threshold = to_float(low, SHIFT)
    tl.store(least + s, threshold)
