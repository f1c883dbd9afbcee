"""min-p, top-k and top-p as one threshold for each row of logits. The twin is `truncation.least_kept_by_sorting`.

The threshold is such that the tokens at or above it reach a count, or a mass. It is searched on the floats' bits, whose
order as integers is the floats', four pivots to a pass over the row, one program to a row: no sort, and nothing that
depends on the order in which threads come.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
LOWEST = tl.constexpr(-3.4e38)  # finite
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
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))).to(tl.int64)


@triton.jit
def to_float(key, SHIFT: tl.constexpr):
    bits = key.to(tl.int32)
    return ((bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def load(logits, start, vocab_size, BLOCK: tl.constexpr):
    """Columns of a row, [1, BLOCK]."""
    column = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def weigh(logits, vocab_size, highest, sharpness, pivots, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """Of the tokens at or above each of the pivots [P], which are finite, the numbers or the masses [P]."""
    above = tl.zeros([pivots.shape[0], BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = load(logits, start, vocab_size, BLOCK)
        weight = 1.0
        if BY_MASS:
            weight = tl.exp((x - highest) * sharpness)
        above += tl.where(x >= pivots[:, None], weight, 0.0)
    return tl.sum(above, 1)


@triton.jit
def search(
    logits, vocab_size, highest, sharpness, low, high, target,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at which the weight reaches `target`, or one that keeps the same; low if none."""
    while high - low > 1:
        keys = low + tl.maximum((high - low) * tl.arange(1, 5) // 5, 1)
        weights = weigh(logits, vocab_size, highest, sharpness, to_float(keys, SHIFT), BLOCK, BY_MASS)
        low = tl.max(tl.where(weights >= target, keys, low), 0)
        high = tl.min(tl.where(weights < target, keys, high), 0)
        if tl.max((weights == target).to(tl.int32), 0) == 1:
            high = low  # exactly so much: nothing between them and the next one matters
    return low


@triton.jit
def kth_key(x, k, low, high, SHIFT: tl.constexpr):
    """The key of the k-th largest of x, which are in registers; low if they are fewer."""
    while high - low > 1:
        middle = low + (high - low) // 2
        reaches = tl.sum((x >= to_float(middle, SHIFT)).to(tl.int32)) >= k
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
        best = tl.full([1, BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            best = tl.maximum(best, load(logits, start, vocab_size, BLOCK))
        highest = tl.max(best)
        low, high = to_key(tl.full([], LOWEST, tl.float32), SHIFT), to_key(highest, SHIFT) + 1
        if min_p > 0:
            worst = tl.full([1, BLOCK], float("inf"), tl.float32)
            for start in range(0, vocab_size, BLOCK):
                x = load(logits, start, vocab_size, BLOCK)
                is_kept = tl.exp((x - highest) * sharpness) >= min_p
                worst = tl.minimum(worst, tl.where(is_kept, x, float("inf")))
            low = to_key(tl.min(worst), SHIFT)
        if top_k < vocab_size:
            # The k-th largest of the columns' maxima is not above the k-th largest of all, and hardly below it.
            low = kth_key(best, top_k, low, high, SHIFT)
            floor = tl.full([1], to_float(low, SHIFT), tl.float32)
            if tl.max(weigh(logits, vocab_size, highest, sharpness, floor, BLOCK, False), 0) > top_k:
                low = search(logits, vocab_size, highest, sharpness, low, high, top_k, SHIFT, BLOCK, False)
        if top_p < 1:
            floor = tl.full([1], to_float(low, SHIFT), tl.float32)
            total = tl.max(weigh(logits, vocab_size, highest, sharpness, floor, BLOCK, True), 0)
            low = search(logits, vocab_size, highest, sharpness, low, high, top_p * total, SHIFT, BLOCK, True)
        threshold = to_float(low, SHIFT)
    tl.store(least + s, threshold)
