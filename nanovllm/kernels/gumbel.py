"""Gumbel-max sampling in one pass over the logits. The twin is `layers.sampler.draw`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter has no libdevice
BLOCK = 2048
TARGET_PROGRAMS = 1024  # enough to fill a large GPU a few times over
# A score and its column in one number: the score's bits above, 0x7FFFFFFE - column below. Two stand for column -1: one below
# every score that can be drawn, and one above.
NOTHING = tl.constexpr(-0x7FFFFFFF80000001)
NAN = tl.constexpr(0x7FFFFFFF7FFFFFFF)


def gumbel_max(
    logits: Tensor, least: Tensor | None, rows: Tensor, positions: Tensor, sampling: Tensor, last_token: Tensor
) -> Tensor:
    """Draw a token for each row of logits [S, vocabulary], whose sampling parameters are `sampling[rows]`, among those
    that are at least `least` [S] float32. Returns int32 [S], -1 where a logit is NaN or all are -inf; `last_token[rows]` is
    set to them, and to 0 for -1."""
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    per_split = triton.cdiv(num_blocks, max(1, TARGET_PROGRAMS // num_rows))
    best = torch.full((num_rows,), NOTHING.value, device=logits.device)
    gumbel_max_kernel[(num_rows, triton.cdiv(num_blocks, per_split))](
        logits, logits.stride(0), vocab_size, logits if least is None else least, rows, positions, sampling, best,
        per_split, HAS_LEAST=least is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    token_ids = torch.empty_like(rows)
    unpack_kernel[(triton.cdiv(num_rows, 128),)](best, rows, token_ids, last_token, num_rows, BLOCK=128)
    return token_ids


@triton.jit(do_not_specialize=["num_rows"])
def unpack_kernel(best, rows, token_ids, last_token, num_rows, BLOCK: tl.constexpr):
    """The columns of the best scores, in the order of the rows and in their places."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = s < num_rows
    token_id = 0x7FFFFFFE - tl.load(best + s, mask=live).to(tl.int32)
    tl.store(token_ids + s, token_id, mask=live)
    tl.store(last_token + tl.load(rows + s, mask=live), tl.maximum(token_id, 0), mask=live)


@triton.jit
def mix64(x):
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def mix32(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def log(x):
    """Within 2^-22 absolutely, in two instructions."""
    if INTERPRETED:
        return tl.log(x)
    return libdevice.fast_logf(x)


@triton.jit(do_not_specialize=["per_split"])  # one compilation for any number of rows
def gumbel_max_kernel(
    logits, stride, vocab_size, least, rows, positions, sampling, best, per_split,
    HAS_LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best column of one split of one row, as a number that orders by score first, then by the lower column."""
    s = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    params = sampling + tl.load(rows + s) * 6
    temperature = tl.load(params).to(tl.float32, bitcast=True)
    seed = (tl.load(params + 5).to(tl.int64) << 32) | (tl.load(params + 4).to(tl.int64) & 0xFFFFFFFF)
    key = mix64(mix64(seed) + tl.load(positions + s))
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    if HAS_LEAST:
        threshold = tl.load(least + s)
    lane = tl.arange(0, BLOCK)
    best_score = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = lane
    is_nan = tl.zeros([BLOCK], tl.int1)
    for block in range(split * per_split, (split + 1) * per_split):
        column = block * BLOCK + lane
        x = tl.load(logits + s * stride + column, mask=column < vocab_size, other=float("-inf"))
        score = x.to(tl.float32)
        if HAS_LEAST:
            score = tl.where(score < threshold, float("-inf"), score)
        if temperature > 0:
            bits = mix32(mix32(column ^ low) ^ high) & 0x7FFFFFFF
            v = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 1 - 5.960464477539063e-08)
            # -log(1 - v), by its series where the logarithm would lose what makes the winners differ
            series = v * (1 + v * (0.5 + v * (1 / 3 + v * (0.25 + v * (0.2 + v * (1 / 6))))))
            exponential = tl.where(v < 0.04, series, -log(1 - v))
            score -= temperature * log(exponential)
        is_nan |= score != score
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_column = tl.where(better, column, best_column)
    bits = (best_score + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFE - best_column).to(tl.int64)
    packed = tl.where(best_score > float("-inf"), packed, NOTHING)
    tl.atomic_max(best + s, tl.max(tl.where(is_nan, NAN, packed), 0), sem="relaxed")
