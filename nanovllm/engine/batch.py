"""Batch and KVCache, which the model is handed, and the way of a step to them: its numbers packed into arrays, sent to the
devices in one copy, and unpacked."""

import marshal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledChunk
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.attention import AttentionBackend

INT = NDArray[np.int32]

# The most that a step may say, in integers: of a row with its part of the work list, of a new entry of a block table, and of a
# token of a chunk with its part of the work list, where each is scored by itself.
INTS_PER_ROW, INTS_PER_BLOCK, INTS_PER_TOKEN = 40, 2, 16

# Chunks are padded to a multiple of so many tokens where layers are compiled, which makes a variant for one token.
TOKEN_MULTIPLE = 8
TRASH = Sequence(0, [0] * TOKEN_MULTIPLE, SamplingParams(), seed=0, max_tokens=1)  # padding, in row 0 and block 0
TRASH_ROW = ScheduledChunk(TRASH, 0, 1, is_sampled=False)


@dataclass
class Batch:
    """T tokens of B sequences: the last token of each (`is_decode`), or chunks of prompts. Tensors are on the device.

    `work_list` has the arrays of the attention backend's `plan`, on the device; `attn_metadata` is what its `prepare`
    returns, and all layers share it.
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
    work_list: list[Tensor]
    attn_metadata: Any = None


@dataclass(eq=False)
class KVCache:
    """A layer's keys and values, [blocks, block_size, H_kv, D] both. An object that a compiler does not look into:
    it would compile the layer anew for another number of blocks."""

    k: Tensor
    v: Tensor


class PackedStep(NamedTuple):
    """All that a rank must know to compute a step, the decode rows first."""

    decodes: list[INT]  # the arrays of a batch of decode rows, with padding; none without rows
    # What the tables have to learn: places and blocks [E]; rows [R] and their sampling parameters [R, 6]
    updates: list[INT]
    chunks: list[INT]  # the arrays of a batch of chunks; none without chunks
    # Rows and positions [S] of the tokens to be drawn; the last tokens [C] of the chunks after which one is drawn
    sampled: list[INT]
    # Slices of hidden states that score the prompt tokens which follow them, [P, 3]: the first row, their number, and how many
    # of the most likely tokens are asked for; then the ids of the tokens that they score
    scored: list[INT]

    def to_bytes(self) -> bytes:
        return marshal.dumps([[(array.shape, array.tobytes()) for array in arrays] for arrays in self])

    @classmethod
    def from_bytes(cls, message: bytes) -> "PackedStep":
        groups = marshal.loads(message)
        return cls(*([np.frombuffer(data, np.int32).reshape(shape) for shape, data in g] for g in groups))


def pack_batch(is_decode: bool, chunks: list[ScheduledChunk], backend: "AttentionBackend") -> list[INT]:
    """The arrays of a batch: rows, context_lens and query_lens [B]; the row, the position and the id of each token [T],
    but no ids of decode rows, which the device has; and the attention plan. Nothing of no chunks."""
    if not chunks:
        return []
    rows = int32([chunk.seq.row for chunk in chunks])
    lens = int32([chunk.num_tokens for chunk in chunks])
    ends = int32([chunk.start for chunk in chunks]) + lens
    token_rows = np.repeat(rows, lens)
    positions = np.arange(len(token_rows)) + np.repeat(ends - lens.cumsum(), lens)
    input_ids: list[int] = []
    for chunk in chunks if not is_decode else ():
        input_ids += chunk.seq.token_ids[chunk.start : chunk.end]
    return [rows, ends, lens, token_rows, int32(positions), int32(input_ids), *backend.plan(is_decode, lens, ends)]


class DeviceTables:
    """What the device remembers between steps, by row (row 0 is trash), and the place where a step's arrays arrive."""

    def __init__(self, config: Config, max_len: int, block_size: int, device: torch.device):
        num_rows, blocks_per_row = config.max_num_seqs + 1, -(-max_len // block_size)
        capacity = num_rows * (INTS_PER_ROW + INTS_PER_BLOCK * blocks_per_row)
        capacity += config.max_num_batched_tokens * INTS_PER_TOKEN + 65536
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self.block_size = block_size
        self.block_tables = zeros(num_rows, blocks_per_row)
        self.last_token = zeros(num_rows)  # the last token sampled for the row
        self.sampling = zeros(num_rows, 6)  # see `pack_sampling`
        self.arrived = zeros(capacity)

    def upload(self, *groups: list[INT]) -> list[list[Tensor]]:
        """Send groups of int32 arrays of any shapes in one copy, which nobody waits for; returns where each array will be.

        Arrays of the same sizes arrive at the same addresses, which is what a CUDA graph reads.
        """
        # PyTorch gives pinned memory out again when what was sent from it is there.
        host = torch.empty(len(self.arrived), dtype=torch.int32, device="cpu", pin_memory=self.arrived.is_cuda)
        buffer = host.numpy()
        views: list[list[Tensor]] = []
        end = 0
        for arrays in groups:
            views.append([])
            for array in arrays:
                start = -(-end // 4) * 4  # 16 bytes: kernels are compiled for aligned pointers
                end = start + array.size
                buffer[start:end] = array.reshape(-1)
                views[-1].append(self.arrived[start:end].view(array.shape))
        self.arrived[:end].copy_(host[:end], non_blocking=True)
        return views

    def update(self, places: Tensor, blocks: Tensor, rows: Tensor, sampling: Tensor) -> None:
        """Learn a step's `updates`."""
        if len(places):
            self.block_tables.view(-1)[places] = blocks
        if len(rows):
            self.sampling[rows] = sampling

    def batch(self, is_decode: bool, arrays: list[INT], views: list[Tensor]) -> Batch:
        """The batch whose packed arrays arrived as `views`. What the tables know is looked up on the device."""
        rows, context_lens, _, token_rows, positions, input_ids, *work_list = views
        places = token_rows * self.block_tables.shape[1] + positions // self.block_size
        blocks = self.block_tables.view(-1).index_select(0, places)
        return Batch(
            is_decode=is_decode,
            input_ids=self.last_token.index_select(0, rows) if is_decode else input_ids,
            positions=positions,
            slot_mapping=blocks.long() * self.block_size + positions % self.block_size,
            rows=rows,
            context_lens=context_lens,
            block_tables=self.block_tables,
            block_size=self.block_size,
            query_lens=arrays[2],
            cpu_context_lens=arrays[1],
            work_list=work_list,
        )


def int32(values: ArrayLike) -> INT:
    return np.asarray(values, np.int32)
