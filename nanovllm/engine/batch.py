"""Batch and KVCache, which the model is handed, and how a step becomes a Batch: it is packed into int32 arrays on the CPU, sent
to the device in one copy, and completed there from what the tables know."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nanovllm import kernels
from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledChunk
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.attention import AttentionBackend
    from nanovllm.engine.shared_prefixes import SharedPrefixes

INT = NDArray[np.int32]

# Upper bounds of the int32s that a step uploads: per decode row, with its part of the work lists; per new entry of a block table;
# per token of a chunk, with its part; and for the rest.
INTS_PER_ROW, INTS_PER_BLOCK, INTS_PER_TOKEN, INTS_PER_STEP = 64, 2, 16, 65536

# With compiled layers chunks are padded to a multiple of so many tokens: torch.compile would compile them again for a single one.
TOKEN_MULTIPLE = 8
TRASH = Sequence(0, array("i", [0] * TOKEN_MULTIPLE), SamplingParams(), seed=0, max_tokens=1)


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
    """A layer's keys and values, [blocks, block_size, H_kv, D] both. torch.compile does not look into the object: it
    would compile the layers again for another number of blocks."""

    k: Tensor
    v: Tensor


class PackedBatch(NamedTuple):
    """What a rank must know of a batch, padding included. Int32 arrays, which `DeviceTables.upload` replaces by tensors."""

    is_decode: bool
    rows: Any  # [B]
    context_lens: Any  # [B]
    query_lens: Any  # [B]
    logits_indices: Any  # places of the tokens whose logits are needed: [C], or a slice of decode rows
    work_list: list[Any]
    # Of chunks only: of decode rows the device works them out.
    token_rows: Any = None  # [T], the row of each token
    positions: Any = None  # [T]
    input_ids: Any = None  # [T]


class PackedStep(NamedTuple):
    """What a rank must know of a step. Int32 arrays, which `DeviceTables.upload` replaces by tensors."""

    # Decode rows, then chunks, if there are any. They come first: a CUDA graph reads decode rows at the buffer's start.
    batches: list[PackedBatch]
    table_indices: Any  # [E], new entries of the block tables
    table_blocks: Any  # [E]
    new_rows: Any  # [R], rows of the sequences that are new to the device
    new_sampling: Any  # [R, 6], their sampling parameters: see `pack_sampling`
    sampled_rows: Any  # [S], of the tokens to be drawn
    sampled_positions: Any  # [S]
    # Slices of the chunks' hidden states that score the prompt tokens which follow them: the first one, their number, and
    # how many of the most likely tokens are asked for.
    scored_slices: list[tuple[int, int, int]]
    scored_ids: Any  # ids of the tokens that they score


def padding(num_tokens: int) -> ScheduledChunk:
    """Tokens in row 0 and block 0, where nobody looks."""
    return ScheduledChunk(TRASH, 0, num_tokens, is_sampled=False)


def pack_decodes(chunks: list[ScheduledChunk], backend: "AttentionBackend", prefixes: "SharedPrefixes") -> PackedBatch:
    """Pack decode rows, of which some may share a prefix, with the attention backend's plan for them."""
    rows = int32([chunk.seq.row for chunk in chunks])
    context_lens = int32([chunk.start for chunk in chunks]) + 1
    batch = PackedBatch(True, rows, context_lens, np.ones_like(rows), slice(None), [])
    shared = prefixes.find(rows, context_lens, backend.shared_tokens)
    return batch._replace(work_list=backend.plan(batch, shared))


def pack_chunks(chunks: list[ScheduledChunk], backend: "AttentionBackend") -> PackedBatch:
    """Pack chunks of prompts, with the attention backend's plan for them."""
    rows = int32([chunk.seq.row for chunk in chunks])
    query_lens = int32([chunk.num_tokens for chunk in chunks])
    context_lens = int32([chunk.start for chunk in chunks]) + query_lens
    token_rows, ends = np.repeat(rows, query_lens), query_lens.cumsum()
    batch = PackedBatch(
        is_decode=False,
        rows=rows,
        context_lens=context_lens,
        query_lens=query_lens,
        logits_indices=int32(ends[[chunk.is_sampled for chunk in chunks]] - 1),
        work_list=[],
        token_rows=token_rows,
        positions=int32(np.arange(len(token_rows)) + np.repeat(context_lens - ends, query_lens)),
        input_ids=np.concatenate([int32(np.asarray(c.seq.token_ids)[c.start : c.end]) for c in chunks]),
    )
    return batch._replace(work_list=backend.plan(batch, None))


class DeviceTables:
    """What the device remembers between steps, by row (row 0 is trash), and the place where a step's arrays arrive."""

    def __init__(self, config: Config, max_len: int, block_size: int, device: torch.device):
        num_rows, blocks_per_row = config.max_num_seqs + 1, -(-max_len // block_size)
        capacity = num_rows * (INTS_PER_ROW + INTS_PER_BLOCK * blocks_per_row)
        capacity += config.max_num_batched_tokens * INTS_PER_TOKEN + INTS_PER_STEP
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self.block_size = block_size
        self.blocks_per_row = blocks_per_row
        self.block_tables = zeros(num_rows, blocks_per_row)
        self.last_token = zeros(num_rows)  # the last token sampled for the row
        self.sampling = zeros(num_rows, 6)  # see `pack_sampling`
        self.upload_buffer, self.nothing = zeros(capacity), zeros(0)

    def upload(self, packed: Any) -> Any:
        """Send the arrays of a PackedStep or PackedBatch in one copy, which nobody waits for; returns the same with tensors,
        where each array will be.

        What comes first arrives at the same addresses if its arrays have the same sizes: a CUDA graph reads it there.
        """
        # PyTorch gives pinned memory out again only when the copy from it is done.
        host = torch.empty_like(self.upload_buffer, device="cpu", pin_memory=self.upload_buffer.is_cuda)
        buffer = host.numpy()
        end = 0

        def copy_in(array: INT) -> Tensor:
            nonlocal end
            if not array.size:
                return self.nothing
            start = -(-end // 4) * 4  # 16 bytes: kernels are compiled for aligned pointers
            end = start + array.size
            buffer[start:end] = array.reshape(-1)
            strides = array.shape[1:] + (1,)  # one or two
            return self.upload_buffer.as_strided(array.shape, strides, start)

        sent = replace_arrays(packed, copy_in)
        self.upload_buffer[:end].copy_(host[:end], non_blocking=True)
        return sent

    def update(self, sent: PackedStep) -> None:
        """Learn what is new in an uploaded step."""
        if len(sent.table_indices):
            self.block_tables.view(-1)[sent.table_indices] = sent.table_blocks
        if len(sent.new_rows):
            self.sampling[sent.new_rows] = sent.new_sampling

    def batch(self, packed: PackedBatch, sent: PackedBatch) -> Batch:
        """The batch that was uploaded. What the tables know is looked up on the device."""
        if packed.is_decode:
            input_ids, positions, slots = self.decode_inputs(sent.rows, sent.context_lens)
        else:
            input_ids, positions = sent.input_ids, sent.positions
            slots = self._slots(sent.token_rows, positions)
        return Batch(
            is_decode=packed.is_decode,
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slots,
            rows=sent.rows,
            context_lens=sent.context_lens,
            block_tables=self.block_tables,
            block_size=self.block_size,
            query_lens=packed.query_lens,
            cpu_context_lens=packed.context_lens,
            work_list=sent.work_list,
        )

    def decode_inputs(self, rows: Tensor, context_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' last tokens and their positions, int32 [B], and their slots, int64 [B]."""
        if rows.is_cuda and kernels.AVAILABLE:
            from nanovllm.kernels.decode_inputs import decode_inputs

            return decode_inputs(rows, context_lens, self.last_token, self.block_tables, self.block_size)
        positions = context_lens - 1
        return self.last_token.index_select(0, rows), positions, self._slots(rows, positions)

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where the KV of tokens goes, by the tokens' rows and positions: int64 [T]."""
        entries = rows * self.blocks_per_row + positions // self.block_size
        blocks = self.block_tables.view(-1).index_select(0, entries)
        return blocks.long() * self.block_size + positions % self.block_size


def replace_arrays(packed: Any, function: Callable[[INT], Tensor]) -> Any:
    """A PackedStep, or a part of one, with what `function` returns in place of each array, in order."""
    if isinstance(packed, np.ndarray):
        return function(packed)
    if isinstance(packed, PackedStep | PackedBatch):
        return type(packed)(*(replace_arrays(part, function) for part in packed))
    return [replace_arrays(part, function) for part in packed] if isinstance(packed, list) else packed


def int32(values: ArrayLike) -> INT:
    return np.asarray(values, np.int32)
