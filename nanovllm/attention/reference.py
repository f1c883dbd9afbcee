"""The reference backend: gather the KV of a sequence, then PyTorch's scaled_dot_product_attention.

It is the readable specification that the other backends are tested against, and the CPU's backend. Query heads that
share a key-value head are never given copies of it: decode rows attend with the group as the query length, chunks
with an expanded (stride 0) view.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.engine.batch import Batch

# Decode rows attend in groups of similar length. One more group costs about as much as so many tokens of padding.
PADDING_TOKENS = 2048
GATHERED_TOKENS = 65536  # and a group gathers no more than this


class DecodeGroup(NamedTuple):
    """Decode rows of similar length, attended to as one padded batch."""

    rows: Tensor | slice  # places in the batch: [R] int64, or all decode rows
    slots: Tensor  # [R * L], of the tokens of each row, padded to the longest in whole blocks
    mask: Tensor  # [R, 1, 1, L] bool, true where there is a token


class Chunk(NamedTuple):
    """Tokens of one sequence that attend to all that came before them and to each other."""

    start: int  # of its tokens in the batch
    end: int
    context_len: int
    blocks: Tensor  # [blocks of the context]
    mask: Tensor | None  # [end - start, context_len] bool; None if nothing came before


class ReferenceAttention(AttentionBackend):
    """Plain PyTorch on any device, any block size, any head size and data type."""

    def prepare(self, batch: Batch) -> list[DecodeGroup] | list[Chunk]:
        return self._decode_groups(batch) if batch.is_decode else self._chunks(batch)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        num_kv_heads, head_dim = k_cache.shape[2:]
        group = q.shape[1] // num_kv_heads
        q = q.unflatten(1, (num_kv_heads, group))  # [T, H_kv, G, D]
        out = torch.empty_like(q)
        if batch.is_decode:
            for rows, slots, mask in batch.attn_metadata:
                shape = (len(mask), -1, num_kv_heads, head_dim)
                k = k_cache.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)  # [R, H_kv, L, D]
                v = v_cache.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)
                out[rows] = F.scaled_dot_product_attention(q[rows], k, v, attn_mask=mask)
            return out.flatten(1, 2)
        for start, end, context_len, blocks, mask in batch.attn_metadata:
            shape = (num_kv_heads, group, context_len, head_dim)
            k = k_cache.index_select(0, blocks).flatten(0, 1)[:context_len].transpose(0, 1)  # [H_kv, L, D]
            v = v_cache.index_select(0, blocks).flatten(0, 1)[:context_len].transpose(0, 1)
            attended = F.scaled_dot_product_attention(
                q[start:end].permute(1, 2, 0, 3),  # [H_kv, G, n, D]
                k.unsqueeze(1).expand(shape),
                v.unsqueeze(1).expand(shape),
                attn_mask=mask,
                is_causal=mask is None,
            )
            out[start:end] = attended.permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    def _decode_groups(self, batch: Batch) -> list[DecodeGroup]:
        lens = np.sort(batch.cpu_context_lens).tolist()
        bounds = [*_group_starts(lens), len(lens)]
        if len(bounds) == 2:
            return [self._decode_group(batch, slice(0, len(lens)), lens[-1])]
        order = batch.context_lens.argsort()
        return [self._decode_group(batch, order[a:b], lens[b - 1]) for a, b in pairwise(bounds)]

    def _decode_group(self, batch: Batch, rows: Tensor | slice, max_len: int) -> DecodeGroup:
        num_blocks = -(-max_len // batch.block_size)
        positions = torch.arange(num_blocks * batch.block_size, device=batch.context_lens.device)
        mask = positions < batch.context_lens[rows].unsqueeze(1)
        blocks = batch.block_tables[batch.rows[rows], :num_blocks].repeat_interleave(batch.block_size, dim=1)
        slots = blocks * batch.block_size + positions % batch.block_size
        # Padding is the row's own first token: a masked value still takes part, and another request's may be NaN.
        slots = torch.where(mask, slots, slots[:, :1])
        return DecodeGroup(rows, slots.flatten(), mask[:, None, None, :])

    def _chunks(self, batch: Batch) -> list[Chunk]:
        chunks = []
        tables = batch.block_tables.index_select(0, batch.rows)
        start = 0
        lens = zip(batch.query_lens.tolist(), batch.cpu_context_lens.tolist(), strict=True)
        for i, (query_len, context_len) in enumerate(lens):
            blocks = tables[i, : -(-context_len // batch.block_size)]
            mask = None
            if query_len < context_len:
                mask = torch.ones(query_len, context_len, dtype=torch.bool, device=blocks.device)
                mask = mask.tril(context_len - query_len)
            chunks.append(Chunk(start, start + query_len, context_len, blocks, mask))
            start += query_len
        return chunks


def _group_starts(lens: list[int]) -> list[int]:
    """Where groups begin in ascending lengths, so that none pads or gathers too much."""
    starts: list[int] = []
    num_tokens = 0
    for i, length in enumerate(lens):
        num_tokens += length
        gathered = (i + 1 - starts[-1]) * length if starts else 0
        if not starts or gathered > GATHERED_TOKENS or gathered - num_tokens > PADDING_TOKENS:
            starts.append(i)
            num_tokens = length
    return starts
