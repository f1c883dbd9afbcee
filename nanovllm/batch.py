"""Batch and KVCache: what the model is handed. They know tensors and counts, no requests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

INT = NDArray[np.int32]


@dataclass
class Batch:
    """T tokens of B sequences: the last token of each (`is_decode`), or chunks of prompts. Tensors are on the device.

    `plan` is what the attention backend's `plan` made of it on the CPU, `attention` what its `prepare` made of both.
    """

    is_decode: bool
    input_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slot_mapping: Tensor  # [T] int64, where each token's KV goes: block * block_size + offset
    rows: Tensor  # [B] int32, of `block_tables`
    context_lens: Tensor  # [B] int32, tokens to attend to: those cached and this step's
    block_tables: Tensor  # [rows, blocks of the longest sequence] int32
    block_size: int
    query_lens: INT  # [B] tokens of this step, on the CPU
    cpu_context_lens: INT  # [B] on the CPU
    plan: list[Tensor]
    attention: Any = None


@dataclass(eq=False)
class KVCache:
    """A layer's keys and values, [blocks, block_size, H_kv, D] both. An object that a compiler does not look into:
    it would compile the layer anew for another number of blocks."""

    k: Tensor
    v: Tensor
