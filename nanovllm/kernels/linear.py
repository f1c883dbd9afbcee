"""A product with few rows, with the norm before it and the gate or the residual after it folded in.

With few rows a product is bound by reading its weights, and every small kernel beside it costs as much as it does.
The twin is `layers.linear.Linear.forward`'s plain path.
"""

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, norm_ptr, residual_ptr, y_ptr, partial_ptr, arrivals, num_rows, eps,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """y[m, n] = norm(x)[m] · w[n] + bias[n] + residual[m, n]; if GATED silu(norm(x)[m] · w[n]) times the same of w[N + n].

    The scale of the norm is the same for all of a row: it is applied at the end. Of the SPLIT programs that share a
    tile, each of which sees a part of K, the last to arrive adds up.
    """
    tile_n = tl.program_id(0)
    tile_m = tl.program_id(1)
    split = tl.program_id(2)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live = m < num_rows
    first = split * (K // SPLIT)
    if PREFETCH:
        PREFETCH_BYTES: tl.constexpr = (K // SPLIT) * 2
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], " + PREFETCH_BYTES.__str__() + "; mov.u32 $0, 0; }",
            "=r,l", [(w_ptr + n * K + first).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    x_at = x_ptr + m[:, None] * K + k[None, :]
    w_at = w_ptr + n[:, None] * K + k[None, :]
    for k0 in range(first, first + K // SPLIT, BK):
        x = tl.load(x_at + k0, mask=live[:, None], other=0.0)
        if HAS_NORM:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, 1)
            x = (x32 * tl.load(norm_ptr + k0 + k).to(tl.float32)[None, :]).to(x.dtype)
        acc = tl.dot(x, tl.trans(tl.load(w_at + k0)), acc)
        if GATED:
            up = tl.dot(x, tl.trans(tl.load(w_at + N * K + k0)), up)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = m[:, None] * N + n[None, :]
    if HAS_NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        acc *= scale
        up *= scale
    if SPLIT > 1:
        tl.store(partial_ptr + split * num_rows * N + at, acc, mask=live[:, None])
        tl.debug_barrier()
        arrival = arrivals + tile_m * tl.num_programs(0) + tile_n
        if tl.atomic_add(arrival, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.store(arrival, 0)
        acc = tl.zeros([BM, BN], tl.float32)
        for i in range(SPLIT):
            acc += tl.load(partial_ptr + i * num_rows * N + at, mask=live[:, None], other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + N + n).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * up
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=live[:, None])
