"""Paged attention: decode rows split over their KV, and chunks of prompts. The twin is `attention.reference`.

Both keep the softmax in base 2 and accumulate in float32. `attention.triton` makes the work lists that they read.
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
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N]
    if MASKED:
        scores = tl.where(live[None, :] & (n[None, :] <= position[:, None]), scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    v = tl.load(v_cache + at, mask=mask, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def decode_kernel(
    q_ptr, k_cache, v_cache, out_ptr, partial_out, partial_lse, arrivals, rows, block_tables, bounds, items, members,
    scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program does the items of one list for one key-value head; M holds G query heads of each member."""
    h = tl.program_id(0) % H_KV
    work = tl.program_id(0) // H_KV
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    for item in range(tl.load(bounds + work), tl.load(bounds + work + 1)):
        start = tl.load(items + item * 4)
        end = tl.load(items + item * 4 + 1)
        first = tl.load(items + item * 4 + 2)
        num_members = tl.load(items + item * 4 + 3)
        table = block_tables + tl.load(rows + tl.load(members + first * 4)).to(tl.int64) * table_stride
        live = m < num_members * G
        member = members + (first + m // G) * 4
        b = tl.load(member, mask=live, other=0)
        part = tl.load(member + 1, mask=live, other=0).to(tl.int64)
        num_parts = tl.load(member + 3, mask=live, other=0)
        head = h * G + m % G
        mask = live[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + (b * q_stride + head * D)[:, None] + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros([M, DP], tl.float32)
        row_max = tl.full([M], float("-inf"), tl.float32)
        row_sum = tl.zeros([M], tl.float32)
        last = tl.full([M], 0, tl.int32) + (end - 1)
        for n0 in range(start, end, N):
            acc, row_max, row_sum = attend_to_tile(
                q, k_cache, v_cache, table, n0, end, last, h, scale, acc, row_max, row_sum,
                BLOCK_SIZE, H_KV, D, DP, N, PRECISION, True,
            )  # fmt: skip
        acc = acc / row_sum[:, None]
        whole = mask & (num_parts == 1)[:, None]
        out = (b.to(tl.int64) * (H_KV * G) + head)[:, None] * D + d[None, :]
        tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=whole)
        cut = live & (num_parts > 1)
        at = part * (H_KV * G) + head
        tl.store(partial_out + at[:, None] * D + d[None, :], acc, mask=mask & cut[:, None])
        tl.store(partial_lse + at, row_max + tl.log2(row_sum), mask=cut)
        tl.debug_barrier()  # the parts are written before this program counts as arrived
        for i in range(num_members):
            row = tl.load(members + (first + i) * 4)
            num_row_parts = tl.load(members + (first + i) * 4 + 3)
            if num_row_parts > 1:
                arrival = arrivals + row * H_KV + h
                if tl.atomic_add(arrival, 1, sem="acq_rel") == num_row_parts - 1:
                    tl.store(arrival, 0)
                    first_part = tl.load(members + (first + i) * 4 + 2).to(tl.int64)
                    merge_parts(
                        partial_out, partial_lse, out_ptr, row, first_part, num_row_parts, h, H_KV, G, D, DP, M
                    )  # fmt: skip


@triton.jit
def merge_parts(
    partial_out, partial_lse, out_ptr, row, first_part, num_parts, h,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a row, each weighted with the share of the softmax that it saw."""
    g = tl.arange(0, M)
    d = tl.arange(0, DP)
    head = h * G + g
    mask = (g < G)[:, None] & (d < D)[None, :]
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    for part in range(first_part, first_part + num_parts):
        at = part * (H_KV * G) + head
        lse = tl.load(partial_lse + at, mask=g < G, other=0.0, cache_modifier=".cg")
        partial = tl.load(partial_out + at[:, None] * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, lse)
        shrink, weight = tl.exp2(row_max - new_max), tl.exp2(lse - new_max)
        acc = acc * shrink[:, None] + partial * weight[:, None]
        row_sum = row_sum * shrink + weight
        row_max = new_max
    acc = acc / row_sum[:, None]
    out = (row.to(tl.int64) * (H_KV * G) + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def prefill_kernel(
    q_ptr, k_cache, v_cache, out_ptr, rows, block_tables, tiles, scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program does one tile of tokens for one key-value head; M holds the G query heads of M // G tokens."""
    tile = tiles + tl.program_id(0) * 4
    h = tl.program_id(1)
    table = block_tables + tl.load(rows + tl.load(tile)).to(tl.int64) * table_stride
    first_token = tl.load(tile + 1)
    num_tokens = tl.load(tile + 2)
    start = tl.load(tile + 3)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    token = m // G
    head = h * G + m % G
    mask = (token < num_tokens)[:, None] & (d < D)[None, :]
    row = (first_token + token).to(tl.int64)
    q = tl.load(q_ptr + (row * q_stride + head * D)[:, None] + d[None, :], mask=mask, other=0.0)
    position = start + token
    end = start + num_tokens
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    num_seen = (start + 1) // N * N  # up to here every token of the tile sees everything
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
    acc = acc / row_sum[:, None]
    out = (row * (H_KV * G) + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)
