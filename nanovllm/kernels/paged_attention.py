"""Paged attention: decode rows split over their KV, and chunks of prompts. The twin is `attention.reference`.

The softmax is in base 2, and all is accumulated in float32. `attention.triton` makes the lists of items that it reads.
"""

import triton
import triton.language as tl


@triton.jit
def attend_to_tile(
    q, k_cache, v_cache, table, n0, end, position, h, scale, acc, row_max, row_sum,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tokens n0 … n0+N-1 that are before `end` and, where MASKED, not after `position` [M] to a softmax."""
    n = n0 + tl.arange(0, N)
    d = tl.arange(0, DP)
    live = n < end
    if BLOCK_SIZE % N == 0:
        block = tl.load(table + n0 // BLOCK_SIZE)
        slot = block.to(tl.int64) * BLOCK_SIZE + (n0 % BLOCK_SIZE + tl.arange(0, N))
    else:
        block = tl.load(table + n // BLOCK_SIZE, mask=live, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
    at = (slot[:, None] * H_KV + h) * D + d[None, :]
    mask = live[:, None] & (d < D)[None, :]
    k = tl.load(k_cache + at, mask=mask, other=0.0)  # [N, D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
    if MASKED:
        scores = tl.where(live[None, :] & (n[None, :] <= position[:, None]), scores, float("-inf"))
    p, acc, row_max, row_sum = add_scores(scores, scale, acc, row_max, row_sum)
    v = tl.load(v_cache + at, mask=mask, other=0.0)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), row_max, row_sum


@triton.jit
def add_scores(scores, scale, acc, row_max, row_sum):
    """Take a tile's scores [M, N] into a softmax. Returns their weights [M, N], and the sums so far at the new maximum; the
    caller adds the weighted values to `acc`."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_max[:, None])  # a multiply-add and an exponential for each
    shrink = tl.exp2(row_max - new_max)
    return p, acc * shrink[:, None], new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def decode_attention_kernel(
    q_ptr, k_cache, v_cache, out_ptr, partial_out, partial_lse, arrivals, rows, block_tables, bounds, items,
    scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program does one list of items, which are parts of rows, for one key-value head: M holds its G query heads."""
    work = tl.program_id(0)
    h = tl.program_id(1)
    g = tl.arange(0, M)
    d = tl.arange(0, DP)
    live = g < G
    mask = live[:, None] & (d < D)[None, :]
    head = h * G + g
    for i in range(tl.load(bounds + work), tl.load(bounds + work + 1)):
        item = items + i * 5
        row = tl.load(item).to(tl.int64)
        start = tl.multiple_of(tl.load(item + 1), N)
        end = tl.load(item + 2)
        first_part = tl.load(item + 3).to(tl.int64)
        num_parts = tl.load(item + 4)
        position = tl.full([M], 0, tl.int32) + (end - 1)
        table = block_tables + tl.load(rows + row).to(tl.int64) * table_stride
        q = tl.load(q_ptr + row * q_stride + head[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros([M, DP], tl.float32)
        row_max = tl.full([M], float("-inf"), tl.float32)
        row_sum = tl.zeros([M], tl.float32)
        for n0 in range(start, end, N):
            acc, row_max, row_sum = attend_to_tile(
                q, k_cache, v_cache, table, n0, end, position, h, scale, acc, row_max, row_sum,
                BLOCK_SIZE, H_KV, D, DP, N, PRECISION, True,
            )  # fmt: skip
        acc = acc / row_sum[:, None]
        if num_parts == 1:
            out = out_ptr + row * (H_KV * G * D) + head[:, None] * D + d[None, :]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            part = i * (H_KV * G) + head
            tl.store(partial_out + part[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(partial_lse + part, row_max + tl.log2(row_sum), mask=live)
            tl.debug_barrier()  # the part is written before this program counts as arrived
            arrival = arrivals + row * H_KV + h
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
                tl.store(arrival, 0)
                merge_parts(partial_out, partial_lse, out_ptr, row, first_part, num_parts, h, H_KV, G, D, DP, M)


@triton.jit
def merge_parts(
    partial_out, partial_lse, out_ptr, row, first_part, num_parts, h,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a row, each weighted with the share of the softmax that it saw."""
    g = tl.arange(0, M)
    d = tl.arange(0, DP)
    live = g < G
    head = h * G + g
    mask = live[:, None] & (d < D)[None, :]
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    for i in range(first_part, first_part + num_parts):
        part = i * (H_KV * G) + head
        lse = tl.load(partial_lse + part, mask=live, other=0.0, cache_modifier=".cg")
        partial = tl.load(partial_out + part[:, None] * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, lse)
        shrink, weight = tl.exp2(row_max - new_max), tl.exp2(lse - new_max)
        acc = acc * shrink[:, None] + partial * weight[:, None]
        row_sum = row_sum * shrink + weight
        row_max = new_max
    acc = acc / row_sum[:, None]
    out = out_ptr + (row * (H_KV * G) + head)[:, None] * D + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def prompt_attention_kernel(
    q_ptr, k_cache, v_cache, k_tiles, v_tiles, out_ptr, rows, block_tables, items, scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program does one item for one key-value head: M holds the G query heads of M // G tokens.

    With descriptors of the caches' tiles [N, D], one thread asks for a tile that all tokens see, and the GPU's copy engine
    brings it. Where a tile may end with tokens that are not the sequence's, it is loaded by address, with zeros for them:
    what is left there may be NaN.
    """
    item = items + tl.program_id(0) * 4
    h = tl.program_id(1)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    token = m // G
    head = h * G + m % G
    first_token = tl.load(item + 1)
    num_tokens = tl.load(item + 2)
    first_position = tl.load(item + 3)
    end = first_position + num_tokens
    row = (first_token + token).to(tl.int64)
    table = block_tables + tl.load(rows + tl.load(item)).to(tl.int64) * table_stride
    mask = (token < num_tokens)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (row * q_stride + head * D)[:, None] + d[None, :], mask=mask, other=0.0)
    position = first_position + token
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    # Up to here every token sees everything: masking takes longer than reading.
    num_seen = (first_position + 1) // N * N
    if HAS_DESCRIPTORS:
        block = tl.load(table)
        for n0 in range(0, num_seen, N):
            next_block = tl.load(table + tl.minimum(n0 + N, end - 1) // BLOCK_SIZE)  # known when its tile is asked for
            slot = block * BLOCK_SIZE + n0 % BLOCK_SIZE
            scores = tl.dot(q, tl.trans(k_tiles.load([slot, h * D])))
            p, acc, row_max, row_sum = add_scores(scores, scale, acc, row_max, row_sum)
            acc = tl.dot(p.to(q.dtype), v_tiles.load([slot, h * D]), acc)
            block = next_block
    else:
        for n0 in range(0, num_seen, N):
            acc, row_max, row_sum = attend_to_tile(
                q, k_cache, v_cache, table, n0, end, position, h, scale, acc, row_max, row_sum,
                BLOCK_SIZE, H_KV, D, DP, N, PRECISION, False,
            )  # fmt: skip
    for n0 in range(num_seen, end, N):
        acc, row_max, row_sum = attend_to_tile(
            q, k_cache, v_cache, table, n0, end, position, h, scale, acc, row_max, row_sum,
            BLOCK_SIZE, H_KV, D, DP, N, PRECISION, True,
        )  # fmt: skip
    out = out_ptr + (row * (H_KV * G) + head)[:, None] * D + d[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
