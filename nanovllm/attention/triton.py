"""The Triton backend: what its kernels have to do in a step, worked out on the CPU.

Decode is split over the KV (FlashDecoding, Dao et al. 2023; Stream-K, Osama et al., arXiv 2301.03598): all tiles of
KV of all rows, laid end to end, are cut into equally long lists, one for each program of a grid that just fills
the GPU. A list is read from device memory, so the grid, and a CUDA graph that holds it, does not depend on lengths.
A row that lies in one list is done there; of a row that was cut, whoever comes last merges the parts.

Prefill is FlashAttention-2 (Dao, arXiv 2307.08691) on the paged cache, the query heads that share a key-value head
packed into one tile.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import INT, Batch
from nanovllm.kernels import MAX_HEAD_DIM
from nanovllm.kernels.gumbel import INTERPRETED
from nanovllm.kernels.paged_attention import decode_attention_kernel, prompt_attention_kernel
from nanovllm.kernels.rotary_store import norm_rotate_store

PROGRAMS_PER_PROCESSOR = 3  # decode programs that share a multiprocessor; 2 and 4 are 5 % slower on an H200
LOG2_E = 1.4426950408889634


class Workspace(NamedTuple):
    """Where the parts of rows that were cut meet; made once a step, used by every layer in turn."""

    partial_out: Tensor  # [parts, H, D] float32, each normalised by its own sum
    partial_lse: Tensor  # [parts, H] float32, log2 of that sum
    arrivals: Tensor  # [B, H_kv] int32, zero between layers


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
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.head_dim**-0.5 * LOG2_E
        self.shape = {
            "H_KV": config.num_key_value_heads,
            "G": self.group,
            "D": config.head_dim,
            "DP": max(16, triton.next_power_of_2(config.head_dim)),
            "PRECISION": "ieee" if config.dtype == torch.float32 else "tf32",
        }
        capability, num_processors = 90, 4  # the interpreter has descriptors
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            capability = properties.major * 10 + properties.minor
            num_processors = properties.multi_processor_count
        self.decode_tiles = decode_tiles(config.head_dim, self.group, config.dtype)
        self.prompt_tiles = prompt_tiles(
            config.head_dim, self.group, config.dtype, block_size or self.block_size, capability
        )
        self.num_lists = max(1, num_processors * PROGRAMS_PER_PROCESSOR // config.num_key_value_heads)

    def plan(self, is_decode: bool, query_lens: INT, context_lens: INT) -> list[INT]:
        if is_decode:
            return split_decodes(context_lens, self.num_lists, self.decode_tiles["N"])
        return [split_chunks(query_lens, context_lens, self.prompt_tiles["M"] // self.group)]

    def prepare(self, batch: Batch) -> Any:
        if not batch.is_decode:
            return None
        num_parts = len(batch.work_list[1])
        new = partial(torch.empty, dtype=torch.float32, device=batch.rows.device)
        return Workspace(
            new(num_parts, self.num_kv_heads * self.group, self.shape["D"]),
            new(num_parts, self.num_kv_heads * self.group),
            torch.zeros(len(batch.rows), self.num_kv_heads, dtype=torch.int32, device=batch.rows.device),
        )

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables = batch.block_tables
        strides = self.scale, q.stride(0), tables.stride(0)
        shape = {"BLOCK_SIZE": k_cache.shape[1], **self.shape}
        if batch.is_decode:
            bounds, items = batch.work_list
            decode_attention_kernel[(len(bounds) - 1, self.num_kv_heads)](
                q, k_cache, v_cache, out, *batch.attn_metadata, batch.rows, tables, bounds, items, *strides,
                **shape, **self.decode_tiles,
            )  # fmt: skip
            return out
        (items,) = batch.work_list
        tiles: list[TensorDescriptor | None] = [None, None]
        if self.prompt_tiles["HAS_DESCRIPTORS"]:
            tile = [self.prompt_tiles["N"], k_cache.shape[3]]
            tiles = [TensorDescriptor.from_tensor(cache.flatten(0, 1).flatten(1), tile) for cache in (k_cache, v_cache)]
        prompt_attention_kernel[(len(items), self.num_kv_heads)](
            q, k_cache, v_cache, *tiles, out, batch.rows, tables, items, *strides, **shape, **self.prompt_tiles
        )
        return out


def decode_tiles(head_dim: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and tokens of a tile, and launch options. On an H200 (head size 128, bfloat16) tiles of 32 or 128 tokens,
    2 warps or more stages are 3 to 15 % slower."""
    rows = max(16, triton.next_power_of_2(group))
    tokens = max(16, 64 >> ((head_dim > 128) + (dtype == torch.float32) * (1 + (rows > 32))))
    is_large = dtype == torch.float32 and rows * head_dim > 8192  # of the largest tiles two stages do not fit
    return {"M": rows, "N": tokens, "num_warps": 4, "num_stages": 1 if is_large else 2}


def prompt_tiles(head_dim: int, group: int, dtype: torch.dtype, block_size: int, capability: int) -> dict[str, Any]:
    """As `decode_tiles`; with descriptors on the GPUs that they were tried on, Hopper's. There (H200, head size 128, bfloat16)
    tiles of 64 rows are as fast up to contexts of 4,096 tokens and 5 % slower beyond, and 128 tokens 10 % slower; without
    the limit of registers a second program does not fit beside the first, which costs 10 %."""
    group = triton.next_power_of_2(group)
    has_descriptors = capability // 10 == 9 and dtype.itemsize == 2 and head_dim in (64, 128) and block_size % 64 == 0
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


def split_decodes(context_lens: INT, num_lists: int, tile: int) -> list[INT]:
    """Cut the KV of decode rows into `num_lists` lists of equally many tiles.

    Returns:
        bounds [num_lists + 1]: list p has the items bounds[p] … bounds[p+1]-1.
        items [B + num_lists, 5]: a row; the tokens start … end-1 of its KV; the first item of the row and how many it has.
            What is left over is zero.

    The shapes depend on the number of rows alone.
    """
    tiles = -(-context_lens // tile)
    row_ends = tiles.cumsum()  # of the tiles of all rows, laid end to end
    total = int(row_ends[-1])
    per_list = -(-total // num_lists)
    ends = np.union1d(row_ends, np.arange(per_list, total, per_list))
    starts = np.concatenate(([0], ends[:-1]))
    rows = np.searchsorted(row_ends, starts, side="right")
    first_parts = np.searchsorted(rows, rows)
    num_parts = np.searchsorted(rows, rows, side="right") - first_parts
    row_starts, row_lens = (row_ends - tiles)[rows], context_lens[rows]
    kv_starts, kv_ends = (starts - row_starts) * tile, np.minimum((ends - row_starts) * tile, row_lens)
    items = np.zeros((len(context_lens) + num_lists, 5), np.int32)
    items[: len(rows)] = np.stack((rows, kv_starts, kv_ends, first_parts, num_parts), axis=1)
    return [np.searchsorted(starts, np.arange(num_lists + 1) * per_list).astype(np.int32), items]


def split_chunks(query_lens: INT, context_lens: INT, tile: int) -> INT:
    """Cut the tokens of chunks into tiles, those with the most KV first: items [n, 4], each the place of a sequence in the
    batch, the first of its tokens in the batch and how many, and the position of that first one."""
    num_tiles = -(-query_lens // tile)
    sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
    offsets = (np.arange(len(sequences)) - (num_tiles.cumsum() - num_tiles)[sequences]) * tile
    tokens = (query_lens.cumsum() - query_lens)[sequences] + offsets
    counts = np.minimum(tile, query_lens[sequences] - offsets)
    positions = (context_lens - query_lens)[sequences] + offsets
    items = np.stack((sequences, tokens, counts, positions), axis=1).astype(np.int32)
    return items[np.argsort(-positions, kind="stable")]
