"""Paged attention: decode rows split over their KV, and chunks of prompts. The twin is `attention.reference`.

The softmax is in base 2, and all is accumulated in float32. `attention.triton` makes the lists of items that it reads.
"""

import triton
import triton.language as tl


@triton.jit
def attend_to_tiles(
    q, k_cache, v_cache, table, start, end, position, h, scale, acc, row_max, row_sum,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the tokens start … end-1 to a softmax. Where MASKED, those after `position` [M or 1, 1] are left out.

    With descriptors of the caches' tiles [N, D], one thread asks for a tile, and the GPU's copy engine brings it: a whole one, that
    all rows of q see. Else tiles are loaded by address, with zeros after `end`: what is left there may be NaN.
    """
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    if HAS_DESCRIPTORS:
        block = tl.load(table + start // BLOCK_SIZE)
        for n0 in range(start, end, N):
            next_block = tl.load(table + tl.minimum(n0 + N, end - 1) // BLOCK_SIZE)  # loaded a tile early
            slot = block * BLOCK_SIZE + n0 % BLOCK_SIZE
            scores = tl.dot(q, tl.trans(k_cache.load([slot, h * D])))
            p, acc, row_max, row_sum = add_scores(scores, scale, acc, row_max, row_sum)
            acc = tl.dot(p.to(q.dtype), v_cache.load([slot, h * D]), acc)
            block = next_block
    else:
        for n0 in range(start, end, N):
            live = n0 + n < end
            mask = live[:, None] & (d < D)[None, :]
            if BLOCK_SIZE % N == 0:  # a tile is in one block: its addresses are a base and offsets that stay
                slot = tl.load(table + n0 // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + n0 % BLOCK_SIZE
                base = (slot * H_KV + h) * D
                at = n[:, None] * (H_KV * D) + d[None, :]
            else:
                block = tl.load(table + (n0 + n) // BLOCK_SIZE, mask=live, other=0)
                slot = block.to(tl.int64) * BLOCK_SIZE + (n0 + n) % BLOCK_SIZE
                base = 0
                at = (slot[:, None] * H_KV + h) * D + d[None, :]
            k_tile, v_tile = k_cache + base, v_cache + base
            k = tl.load(k_tile + at, mask=mask, other=0.0)  # [N, D]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
            if MASKED:
                scores = tl.where((n0 + n)[None, :] <= position, scores, float("-inf"))
            p, acc, row_max, row_sum = add_scores(scores, scale, acc, row_max, row_sum)
            v = tl.load(v_tile + at, mask=mask, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


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
    q_ptr, k_cache, v_cache, k_tiles, v_tiles, out_ptr, partial_out, partial_lse, arrivals, block_tables,
    bounds, items, pairs, part_starts, scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, M_SHARED: tl.constexpr, N: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program does one list of items for one key-value head: first those of many rows, in tiles of M_SHARED, then those of
    few rows, in tiles of M. Each is a loop of its own, so that the first takes no registers from the second."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    work = tl.program_id(0)
    first, last = tl.load(bounds + work), tl.load(bounds + work + 1)
    if M_SHARED > M:
        num_tall = tl.load(bounds + tl.num_programs(0) + 1)
        attend_to_items(
            q_ptr, k_tiles, v_tiles, out_ptr, partial_out, partial_lse, arrivals, block_tables,
            first, tl.minimum(last, num_tall), items, pairs, part_starts, scale, q_stride, table_stride,
            BLOCK_SIZE, H_KV, G, D, DP, PRECISION, M_SHARED, N, True, IS_DEPENDENT,
        )  # fmt: skip
        first = tl.maximum(first, num_tall)
    attend_to_items(
        q_ptr, k_cache, v_cache, out_ptr, partial_out, partial_lse, arrivals, block_tables,
        first, last, items, pairs, part_starts, scale, q_stride, table_stride,
        BLOCK_SIZE, H_KV, G, D, DP, PRECISION, M, N, False, IS_DEPENDENT,
    )  # fmt: skip


@triton.jit
def attend_to_items(
    q_ptr, k_cache, v_cache, out_ptr, partial_out, partial_lse, arrivals, block_tables,
    first, last, items, pairs, part_starts, scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The items first … last-1: M holds the G query heads of each row of an item. Of a row that has several parts, whoever comes
    last adds them up."""
    h = tl.program_id(1)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    head = h * G + m % G
    for i in range(first, last):
        item = items + i * 6
        table = block_tables + tl.load(item).to(tl.int64) * table_stride
        pair = pairs + (tl.load(item + 1) + m // G) * 2
        live = m // G < tl.load(item + 2)
        start = tl.multiple_of(tl.load(item + 3), N)
        end = tl.load(item + 4)
        row = tl.load(pair, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (d < D)[None, :]
        if IS_DEPENDENT:  # what is read before this was there before the step
            tl.extra.cuda.gdc_wait()
        q = tl.load(q_ptr + (row * q_stride + head * D)[:, None] + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros([M, DP], tl.float32)
        row_max = tl.full([M], float("-inf"), tl.float32)
        row_sum = tl.zeros([M], tl.float32)
        position = tl.full([1, 1], end - 1, tl.int32)
        acc, row_max, row_sum = attend_to_tiles(
            q, k_cache, v_cache, table, start, end, position, h, scale, acc, row_max, row_sum,
            BLOCK_SIZE, H_KV, D, DP, N, PRECISION, True, HAS_DESCRIPTORS,
        )  # fmt: skip
        acc = acc / row_sum[:, None]
        at_out = row * (H_KV * G) + head
        if tl.load(item + 5):  # the only part of its only row
            tl.store(out_ptr + at_out[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            at_part = tl.load(pair + 1, mask=live, other=0).to(tl.int64) * (H_KV * G) + head
            tl.store(partial_out + at_part[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(partial_lse + at_part, row_max + tl.log2(row_sum), mask=live)
            first_part = tl.load(part_starts + row, mask=live, other=0)
            num_parts = tl.load(part_starts + row + 1, mask=live, other=0) - first_part
            tl.debug_barrier()  # the part is written before this program counts as arrived
            is_last = live & (tl.atomic_add(arrivals + at_out, 1, mask=live, sem="acq_rel") == num_parts - 1)
            most_parts = tl.max(tl.where(is_last, num_parts, 0), 0)
            if most_parts > 0:
                tl.debug_barrier()  # all threads read the other parts after this
                tl.store(arrivals + at_out, 0, mask=is_last)
                merge_parts(
                    partial_out, partial_lse, out_ptr, at_out, head, first_part, num_parts, most_parts, is_last,
                    H_KV, G, D, DP, M,
                )  # fmt: skip


@triton.jit
def merge_parts(
    partial_out, partial_lse, out_ptr, at_out, head, first_part, num_parts, most_parts, is_last,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add up the parts of those rows [M] whose last part this is, each weighted with the share of the softmax that it saw."""
    d = tl.arange(0, DP)
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    for i in range(most_parts):
        live = is_last & (i < num_parts)
        mask = live[:, None] & (d < D)[None, :]
        part = (first_part + i).to(tl.int64) * (H_KV * G) + head
        lse = tl.load(partial_lse + part, mask=live, other=float("-inf"), cache_modifier=".cg")
        lse = tl.where(is_last, lse, 0.0)  # in idle rows -inf less -inf would be NaN
        partial = tl.load(partial_out + part[:, None] * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, lse)
        shrink, weight = tl.exp2(row_max - new_max), tl.exp2(lse - new_max)
        acc = acc * shrink[:, None] + partial * weight[:, None]
        row_sum = row_sum * shrink + weight
        row_max = new_max
    acc = acc / row_sum[:, None]
    out = out_ptr + at_out[:, None] * D + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_last[:, None] & (d < D)[None, :])


@triton.jit
def prompt_attention_kernel(
    q_ptr, k_cache, v_cache, k_tiles, v_tiles, out_ptr, rows, block_tables, items, scale, q_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program does one item for one key-value head: M holds the G query heads of M // G tokens.

    Tiles that all tokens see come by descriptors, where the GPU has them.
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
    position = (first_position + token)[:, None]
    acc = tl.zeros([M, DP], tl.float32)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    # Up to here every token sees everything: masking takes longer than reading.
    num_seen = (first_position + 1) // N * N
    acc, row_max, row_sum = attend_to_tiles(
        q, k_tiles if HAS_DESCRIPTORS else k_cache, v_tiles if HAS_DESCRIPTORS else v_cache, table, 0, num_seen, position,
        h, scale, acc, row_max, row_sum, BLOCK_SIZE, H_KV, D, DP, N, PRECISION, False, HAS_DESCRIPTORS,
    )  # fmt: skip
    acc, row_max, row_sum = attend_to_tiles(
        q, k_cache, v_cache, table, num_seen, end, position, h, scale, acc, row_max, row_sum,
        BLOCK_SIZE, H_KV, D, DP, N, PRECISION, True, False,
    )  # fmt: skip
    out = out_ptr + (row * (H_KV * G) + head)[:, None] * D + d[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
