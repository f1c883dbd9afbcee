"""The Triton backend: which tiles its kernels use, and what they are launched with.

Decode is split over the KV: `work_lists` says how. Prefill is FlashAttention-2 (Dao, arXiv 2307.08691) on the paged cache,
the query heads that share a key-value head packed into one tile.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.work_lists import DecodeLists, split_chunks
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import INT, Batch, PackedBatch
from nanovllm.engine.shared_prefixes import SharedRuns
from nanovllm.kernels import MAX_HEAD_DIM, dependent_launch
from nanovllm.kernels.gumbel import INTERPRETED
from nanovllm.kernels.paged_attention import decode_attention_kernel, prompt_attention_kernel
from nanovllm.kernels.rotary_store import norm_rotate_store

PROGRAMS_PER_PROCESSOR = 3  # decode programs that share a multiprocessor; 2 and 4 are 5 % slower on an H200
LOG2_E = 1.4426950408889634


class Workspace(NamedTuple):
    """Where the parts of rows meet; made once a step, used by every layer in turn."""

    partial_out: Tensor  # [parts, H, D] float32, each normalised by its own sum
    partial_lse: Tensor  # [parts, H] float32, log2 of that sum of exponentials
    arrivals: Tensor  # [B, H] int32, zero between layers


class TritonAttention(AttentionBackend):
    """Any GQA ratio and block size, head sizes up to 256, bfloat16, float16 and float32."""

    block_size = 64
    capturable = True
    store = staticmethod(norm_rotate_store)

    def __init__(self, config: ModelConfig, device: torch.device, block_size: int | None = None):
        if device.type != "cuda" and not INTERPRETED.value:  # by Triton on the CPU, for tests
            raise ValueError(f"attention_backend='triton' needs a GPU, got device {str(device)!r}")
        if config.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"attention_backend='triton' runs head sizes up to {MAX_HEAD_DIM}, got {config.head_dim}")
        self.num_kv_heads = config.num_key_value_heads
        self.heads_per_kv = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.head_dim**-0.5 * LOG2_E
        self.shape = {
            "H_KV": config.num_key_value_heads,
            "G": self.heads_per_kv,
            "D": config.head_dim,
            "DP": max(16, triton.next_power_of_2(config.head_dim)),
            "PRECISION": "ieee" if config.dtype == torch.float32 else "tf32",
        }
        capability, num_processors = 90, 4  # the interpreter has descriptors
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            capability = properties.major * 10 + properties.minor
            num_processors = properties.multi_processor_count
        has_descriptors = descriptors_pay(config.head_dim, config.dtype, block_size or self.block_size, capability)
        self.decode_tiles = decode_tiles(config.head_dim, self.heads_per_kv, config.dtype, has_descriptors)
        self.prompt_tiles = prompt_tiles(config.head_dim, self.heads_per_kv, config.dtype, has_descriptors)
        few_rows, most_rows = (self.decode_tiles[name] // self.heads_per_kv for name in ("M", "M_SHARED"))
        self.shared_tokens = self.decode_tiles["N"] if most_rows > 1 else 0
        num_lists = max(1, num_processors * PROGRAMS_PER_PROCESSOR // config.num_key_value_heads)
        self.decode_lists = DecodeLists(num_lists, self.decode_tiles["N"], few_rows, most_rows)

    def plan(self, batch: PackedBatch, shared: SharedRuns | None) -> list[INT]:
        if shared is None:  # chunks
            return [split_chunks(batch.query_lens, batch.context_lens, self.prompt_tiles["M"] // self.heads_per_kv)]
        return self.decode_lists.split(batch.rows, batch.context_lens, shared)

    def prepare(self, batch: Batch) -> Any:
        if not batch.is_decode:
            return None
        num_parts, num_heads = len(batch.work_list[2]), self.num_kv_heads * self.heads_per_kv
        new = partial(torch.empty, dtype=torch.float32, device=batch.rows.device)
        return Workspace(
            new(num_parts, num_heads, self.shape["D"]),
            new(num_parts, num_heads),
            torch.zeros(len(batch.rows), num_heads, dtype=torch.int32, device=batch.rows.device),
        )

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables = batch.block_tables
        strides = self.scale, q.stride(0), tables.stride(0)
        shape = {"BLOCK_SIZE": k_cache.shape[1], **self.shape}
        tiles: list[TensorDescriptor | None] = [None, None]
        if self.prompt_tiles["HAS_DESCRIPTORS"]:
            tile = [self.prompt_tiles["N"], k_cache.shape[3]]  # decode's are as long
            tiles = [TensorDescriptor.from_tensor(cache.flatten(0, 1).flatten(1), tile) for cache in (k_cache, v_cache)]
        if batch.is_decode:
            grid = len(batch.work_list[0]) - 2, self.num_kv_heads
            decode_attention_kernel[grid](
                q, k_cache, v_cache, *tiles, out, *batch.attn_metadata, tables, *batch.work_list, *strides,
                **shape, **self.decode_tiles, **dependent_launch(len(q)),
            )  # fmt: skip
            return out
        (items,) = batch.work_list
        prompt_attention_kernel[(len(items), self.num_kv_heads)](
            q, k_cache, v_cache, *tiles, out, batch.rows, tables, items, *strides, **shape, **self.prompt_tiles
        )
        return out


def descriptors_pay(head_dim: int, dtype: torch.dtype, block_size: int, capability: int) -> bool:
    """Whether tiles of KV come through tensor descriptors: on the GPUs that they were tried on, Hopper's."""
    return capability // 10 == 9 and dtype.itemsize == 2 and head_dim in (64, 128) and block_size % 64 == 0


def decode_tiles(head_dim: int, group: int, dtype: torch.dtype, has_descriptors: bool) -> dict[str, Any]:
    """M: query heads in a tile. N: its tokens. M_SHARED: query heads in a tile of KV that many rows share. And launch options.

    On an H200 (head size 128, bfloat16) tiles of 32 or 128 tokens, 2 warps or more stages are 3 to 15 % slower. Shared tiles of 64
    heads and 32 tokens are as fast for 256 rows, and for 32 rows half as fast. The limit of registers keeps room for a third
    program, and decides how ptxas orders the products: with 168 in place of 160 classic's attention takes 0.4 % longer.
    """
    rows = max(16, triton.next_power_of_2(group))
    tokens = max(16, 64 >> ((head_dim > 128) + (dtype == torch.float32) * (1 + (rows > 32))))
    is_large = dtype == torch.float32 and rows * head_dim > 8192  # of the largest tiles two stages do not fit
    return {
        "M": rows, "N": tokens, "M_SHARED": max(32, rows) if has_descriptors else rows,
        "num_warps": 4, "num_stages": 1 if is_large else 2, "maxnreg": 160 if has_descriptors else None,
    }  # fmt: skip


def prompt_tiles(head_dim: int, group: int, dtype: torch.dtype, has_descriptors: bool) -> dict[str, Any]:
    """As `decode_tiles`. On an H200 (head size 128, bfloat16) with descriptors tiles of 64 rows are as fast up to contexts of
    4,096 tokens and 5 % slower beyond, and 128 tokens 10 % slower; without the limit of registers a second program does not fit
    beside the first, which costs 10 %."""
    group = triton.next_power_of_2(group)
    if has_descriptors:
        rows, tokens, warps, stages = 128, 64, 8, 2
    elif dtype == torch.float32:
        rows, tokens, warps, stages = 32, 16, 4, 1
    elif head_dim > 128:
        rows, tokens, warps, stages = 64, 32, 8, 2
    else:
        rows, tokens, warps, stages = 64, 64, 4, 2
    return {
        "M": max(rows, group), "N": tokens, "HAS_DESCRIPTORS": has_descriptors,
        "num_warps": warps, "num_stages": stages, "maxnreg": 128 if has_descriptors else None,
    }  # fmt: skip
