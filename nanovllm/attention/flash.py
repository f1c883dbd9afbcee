"""The flash-attn backend: chunks of prompts by its package's kernels on the paged cache; decode rows by our own, which are faster.

The package is flash-attn-4, on Hopper the method of FlashAttention-3 (Shah et al., arXiv 2407.08608), or where that does not run
flash-attn 2 (Dao, arXiv 2307.08691).
"""

import os
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.triton import TritonAttention
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import INT, Batch, PackedBatch, int32
from nanovllm.engine.shared_prefixes import SharedRuns
from nanovllm.kernels import MAX_HEAD_DIM

BLOCK_SIZES = {4: 128, 2: 256}  # by version: in which 4 is fastest, and which 2 needs


class SequenceTables(NamedTuple):
    """What flash-attn asks for, the same in every layer."""

    block_tables: Tensor  # [B, blocks of the longest sequence] int32, the batch's own
    unwritten: Tensor  # the slots of each sequence's last block that are after its last token; 0 in place of the others
    max_query_len: int
    max_context_len: int


class FlashAttention(TritonAttention):
    """bfloat16 and float16, in blocks of 128 tokens with flash-attn-4 and of 256 with flash-attn 2."""

    def __init__(self, config: ModelConfig, device: torch.device, block_size: int | None = None):
        if device.type != "cuda":
            raise ValueError(f"attention_backend='flash-attn' needs a GPU, got device {str(device)!r}")
        if config.head_dim > MAX_HEAD_DIM or config.head_dim % 8:
            raise ValueError(
                f"attention_backend='flash-attn' runs head sizes up to {MAX_HEAD_DIM} that 8 divides, got {config.head_dim}"
            )
        if config.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"attention_backend='flash-attn' needs bfloat16 or float16, got {config.dtype}")
        self.version = installed_version(device)
        if self.version is None:
            raise ValueError(
                "attention_backend='flash-attn' needs the package flash-attn-4 and a GPU of compute capability 9.0 or 10.x, or "
                "the package flash-attn, which is version 2; 'auto' takes what is there"
            )
        self.block_size = BLOCK_SIZES[self.version]
        if block_size not in (None, self.block_size):
            raise ValueError(
                f"kvcache_block_size must be {self.block_size} with attention_backend='flash-attn' (version "
                f"{self.version}), got {block_size}"
            )
        super().__init__(config, device, self.block_size)
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # keeps what it compiles; read at import
        try:
            package = import_module("flash_attn.cute" if self.version == 4 else "flash_attn")
        except ImportError as error:
            raise ValueError(f"attention_backend='flash-attn': its package cannot be imported: {error}") from error
        self.attend_to_chunks = package.flash_attn_varlen_func

    def plan(self, batch: PackedBatch, shared: SharedRuns | None) -> list[INT]:
        """For chunks, where each begins in the queries and in the keys, and where the last one ends."""
        if batch.is_decode:
            return super().plan(batch, shared)
        return [int32(np.append(0, lens.cumsum())) for lens in (batch.query_lens, batch.context_lens)]

    def prepare(self, batch: Batch) -> Any:
        if batch.is_decode:
            return super().prepare(batch)
        tables = batch.block_tables.index_select(0, batch.rows)
        lasts = (batch.context_lens - 1).long().unsqueeze(1)  # [B, 1], the positions of the last tokens
        offsets = torch.arange(batch.block_size, device=lasts.device)
        slots = tables.gather(1, lasts // batch.block_size) * batch.block_size + offsets
        unwritten = torch.where(offsets > lasts % batch.block_size, slots, 0).flatten()
        return SequenceTables(tables, unwritten, int(batch.query_lens.max()), int(batch.cpu_context_lens.max()))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        if batch.is_decode:
            return super().attend(q, k_cache, v_cache, batch)
        query_starts, key_starts = batch.work_list
        tables, unwritten, max_query_len, max_context_len = batch.attn_metadata
        options = {"cu_seqlens_k": key_starts, "block_table": tables}
        if self.version == 4:
            # It multiplies what follows a sequence's last token by 0, and another request may have left a NaN there.
            v_cache.flatten(0, 1).index_fill_(0, unwritten, 0)
            options = {"seqused_k": batch.context_lens, "page_table": tables}
        out = self.attend_to_chunks(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=query_starts,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_context_len,
            causal=True,
            **options,
        )
        return out[0] if self.version == 4 else out


def installed_version(device: torch.device) -> int | None:
    """The flash-attn for a GPU: 4 where it is installed and has kernels for a paged cache, else 2, if that is."""
    with suppress(PackageNotFoundError):
        version("flash-attn-4")
        if torch.cuda.get_device_capability(device)[0] in (9, 10):
            return 4
    package = find_spec("flash_attn")
    # flash-attn-4 alone makes it a namespace, which has no file.
    return 2 if package is not None and package.origin is not None else None
