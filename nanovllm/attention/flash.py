"""The flash-attn backend: the package's kernels (FlashAttention-2, Dao, arXiv 2307.08691) on the paged cache."""

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.batch import INT, Batch
from nanovllm.config import ModelConfig
from nanovllm.kernels import MAX_HEAD_DIM
from nanovllm.kernels.rotary_store import norm_rotate_store


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
        """Where each sequence begins in the queries and in the keys, and where the last one ends."""
        return [np.concatenate(([0], lens.cumsum())).astype(np.int32) for lens in (query_lens, context_lens)]

    def prepare(self, batch: Batch) -> tuple[Tensor, int]:
        """The block tables of the batch's sequences, and the most tokens that one of them has."""
        return batch.block_tables.index_select(0, batch.rows), int(batch.query_lens.max())

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        block_tables, max_query_len = batch.attention
        query_starts, key_starts = batch.plan
        return flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=max_query_len,
            max_seqlen_k=block_tables.shape[1] * batch.block_size,
            block_table=block_tables,
            causal=True,
        )
