"""The flash-attn backend: the package's kernels (FlashAttention-2, Dao, arXiv 2307.08691) on the paged cache."""

from typing import NamedTuple

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import INT, Batch
from nanovllm.kernels import MAX_HEAD_DIM
from nanovllm.kernels.rotary_store import norm_rotate_store


class SequenceTables(NamedTuple):
    """What flash-attn asks for, the same in every layer."""

    block_tables: Tensor  # [B, blocks of the longest sequence] int32, the batch's own
    max_query_len: int
    max_context_len: int


class FlashAttention(AttentionBackend):
    """bfloat16 and float16, in blocks of 256 tokens."""

    block_size = 256
    capturable = True
    store = staticmethod(norm_rotate_store)

    def __init__(self, config: ModelConfig, device: torch.device, block_size: int | None):
        if device.type != "cuda":
            raise ValueError(f"attention_backend='flash-attn' needs a GPU, got device {str(device)!r}")
        if config.head_dim > MAX_HEAD_DIM or config.head_dim % 8:
            raise ValueError(
                f"attention_backend='flash-attn' runs head sizes up to {MAX_HEAD_DIM} that 8 divides, got {config.head_dim}"
            )
        if config.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"attention_backend='flash-attn' needs bfloat16 or float16, got {config.dtype}")
        if block_size not in (None, self.block_size):
            raise ValueError(
                f"kvcache_block_size must be {self.block_size} with attention_backend='flash-attn', got {block_size}"
            )

    def plan(self, is_decode: bool, query_lens: INT, context_lens: INT) -> list[INT]:
        """For chunks, where each begins in the queries and in the keys, and where the last one ends."""
        if is_decode:
            return []
        return [np.concatenate(([0], lens.cumsum())).astype(np.int32) for lens in (query_lens, context_lens)]

    def prepare(self, batch: Batch) -> SequenceTables:
        tables = batch.block_tables.index_select(0, batch.rows)
        return SequenceTables(tables, int(batch.query_lens.max()), int(batch.cpu_context_lens.max()))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        shared: SequenceTables = batch.attn_metadata
        if batch.is_decode:
            return flash_attn_with_kvcache(
                q.unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=batch.context_lens,
                block_table=shared.block_tables,
                causal=True,
            ).squeeze(1)
        query_starts, key_starts = batch.work_list
        return flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=shared.max_query_len,
            max_seqlen_k=shared.max_context_len,
            block_table=shared.block_tables,
            causal=True,
        )
