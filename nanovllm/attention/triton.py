"""The Triton backend: what its kernels have to do in a step, worked out on the CPU.

Decode is split over the KV (FlashDecoding, Dao et al. 2023; Stream-K, Osama et al., arXiv 2301.03598): all tiles of
KV of all rows, laid end to end, are cut into equally long lists, one for each program of a grid that just fills
the GPU. A list is read from device memory, so the grid, and a CUDA graph that holds it, does not depend on lengths.
A row that lies in one list is done there; of a row that was cut, whoever comes last merges the parts.

Prefill is FlashAttention-2 (Dao, arXiv 2307.08691) on the paged cache, the query heads that share a key-value head
packed into one tile.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.batch import INT, Batch
from nanovllm.config import ModelConfig
from nanovllm.kernels import MAX_HEAD_DIM
from nanovllm.kernels.gumbel import INTERPRETED
from nanovllm.kernels.paged_attention import decode_kernel, prefill_kernel
from nanovllm.kernels.rotary_store import norm_rotate_store

PROGRAMS_PER_PROCESSOR = 3  # decode programs that share a multiprocessor; 2 and 4 are 5 % slower on an H200
LOG2_E = 1.4426950408889634


class DecodeWorkspace(NamedTuple):
    """Where the parts of cut rows meet; made once a step, used by every layer in turn."""

    partial_out: Tensor  # [parts, H, D] float32, each normalised by its own sum
    partial_lse: Tensor  # [parts, H] float32, log2 of that sum
    arrivals: Tensor  # [B, H_kv] int32, zero between layers


class TritonAttention(AttentionBackend):
    """Any GQA ratio and block size, head sizes up to 256, bfloat16, float16 and float32."""

    block_size = 64
    capturable = True
    store = staticmethod(norm_rotate_store)

    def __init__(self, config: ModelConfig, device: torch.device):
        if device.type != "cuda" and not INTERPRETED.value:  # by Triton on the CPU, for tests
            raise ValueError(f"attention_backend='triton' needs a GPU, got device {str(device)!r}")
        if config.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"attention_backend='triton' runs head sizes up to {MAX_HEAD_DIM}, got {config.head_dim}")
        self.num_kv_heads = config.num_kv_heads
        self.group = config.num_heads // config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 * LOG2_E
        self.decode_tiles = decode_tiles(config.head_dim, self.group, config.dtype)
        self.prefill_tiles = prefill_tiles(config.head_dim, self.group, config.dtype)
        num_processors = 4
        if device.type == "cuda":
            num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.num_lists = max(1, num_processors * PROGRAMS_PER_PROCESSOR // config.num_kv_heads)

    def plan(self, is_decode: bool, query_lens: INT, context_lens: INT) -> list[INT]:
        if is_decode:
            return split_decodes(context_lens, self.num_lists, self.decode_tiles["N"])
        return [split_chunks(query_lens, context_lens, self.prefill_tiles["M"] // self.group)]

    def prepare(self, batch: Batch) -> DecodeWorkspace | None:
        if not batch.is_decode:
            return None
        num_parts, device = len(batch.plan[1]), batch.input_ids.device
        num_heads = self.num_kv_heads * self.group
        return DecodeWorkspace(
            torch.empty(num_parts, num_heads, self.head_dim, dtype=torch.float32, device=device),
            torch.empty(num_parts, num_heads, dtype=torch.float32, device=device),
            torch.zeros(len(batch.rows), self.num_kv_heads, dtype=torch.int32, device=device),
        )

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables = batch.block_tables
        if batch.is_decode:
            decode_kernel[(self.num_lists * self.num_kv_heads,)](
                q, k_cache, v_cache, out, *batch.attention, batch.rows, tables, *batch.plan,
                self.scale, q.stride(0), tables.stride(0), **self._shape(k_cache), **self.decode_tiles,
            )  # fmt: skip
        else:
            (tiles,) = batch.plan
            prefill_kernel[(len(tiles), self.num_kv_heads)](
                q, k_cache, v_cache, out, batch.rows, tables, tiles,
                self.scale, q.stride(0), tables.stride(0), **self._shape(k_cache), **self.prefill_tiles,
            )  # fmt: skip
        return out

    def _shape(self, k_cache: Tensor) -> dict[str, Any]:
        return {
            "BLOCK_SIZE": k_cache.shape[1],
            "H_KV": self.num_kv_heads,
            "G": self.group,
            "D": self.head_dim,
            "DP": max(16, triton.next_power_of_2(self.head_dim)),
            "PRECISION": "ieee" if k_cache.dtype == torch.float32 else "tf32",
        }


def decode_tiles(head_dim: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and tokens of a tile, and launch options. On an H200 (head size 128, bfloat16) tiles of 32 or 128 tokens,
    2 warps or more stages are 3 to 15 % slower."""
    rows = max(16, triton.next_power_of_2(group))
    tokens = max(16, 64 >> ((head_dim > 128) + (dtype == torch.float32) * (1 + (rows > 32))))
    is_large = dtype == torch.float32 and rows * head_dim > 8192  # of the largest tiles two stages do not fit
    return {"M": rows, "N": tokens, "num_warps": 4, "num_stages": 1 if is_large else 2}


def prefill_tiles(head_dim: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """As `decode_tiles`."""
    group = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return {"M": max(32, group), "N": 16, "num_warps": 4, "num_stages": 1}
    if head_dim > 128:
        return {"M": max(64, group), "N": 32, "num_warps": 8, "num_stages": 2}
    return {"M": max(64, group), "N": 64, "num_warps": 4, "num_stages": 2}


def split_decodes(context_lens: INT, num_lists: int, tile: int) -> list[INT]:
    """Cut the KV of decode rows into `num_lists` lists of equally many tiles.

    An item has one member yet: rows that share blocks will attend to them together.

    Returns:
        bounds [num_lists + 1]: list p has the items bounds[p] … bounds[p+1]-1.
        items [B + num_lists, 4]: the tokens start … end-1 of one block table, and the first and the number of the
            members that attend to them.
        members [B + num_lists, 4]: a row of the batch, where its part goes, its first part and its number of parts.

    The shapes depend on the number of rows alone; what is left over is zero.
    """
    num_rows = len(context_lens)
    tiles = -(-context_lens // tile)
    ends = tiles.cumsum()
    starts = ends - tiles
    total = int(ends[-1])
    per_list = -(-total // num_lists)
    item_ends = np.union1d(ends, np.arange(per_list, total, per_list))
    item_starts = np.concatenate(([0], item_ends[:-1]))
    rows = np.searchsorted(ends, item_starts, side="right")
    num_items = len(rows)
    num_parts = np.bincount(rows, minlength=num_rows)
    index = np.arange(num_items)
    items = np.zeros((num_rows + num_lists, 4), np.int32)
    items[:num_items, 0] = (item_starts - starts[rows]) * tile
    items[:num_items, 1] = np.minimum((item_ends - starts[rows]) * tile, context_lens[rows])
    items[:num_items, 2] = index
    items[:num_items, 3] = 1
    members = np.zeros_like(items)
    members[:num_items, 0] = rows
    members[:num_items, 1] = index
    members[:num_items, 2] = (num_parts.cumsum() - num_parts)[rows]
    members[:num_items, 3] = num_parts[rows]
    bounds = np.searchsorted(item_starts, np.arange(num_lists + 1) * per_list).astype(np.int32)
    return [bounds, items, members]


def split_chunks(query_lens: INT, context_lens: INT, tile: int) -> INT:
    """Cut the tokens of chunks into tiles, those with the most KV first.

    Returns [tiles, 4]: the sequence, its tokens in the batch (first, number), and the position of the first one.
    """
    num_tiles = -(-query_lens // tile)
    sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
    offsets = (np.arange(len(sequences)) - (num_tiles.cumsum() - num_tiles)[sequences]) * tile
    tiles = np.empty((len(sequences), 4), np.int32)
    tiles[:, 0] = sequences
    tiles[:, 1] = (query_lens.cumsum() - query_lens)[sequences] + offsets
    tiles[:, 2] = np.minimum(tile, query_lens[sequences] - offsets)
    tiles[:, 3] = (context_lens - query_lens)[sequences] + offsets
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]
