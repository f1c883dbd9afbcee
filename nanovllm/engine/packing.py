"""The way of a step to the devices: its numbers packed into one tensor, sent in one copy, and unpacked into Batches."""

import marshal
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm.attention import AttentionBackend
from nanovllm.engine.batch import INT, Batch
from nanovllm.engine.scheduler import ScheduledChunk
from nanovllm.engine.sequence import Sequence


class DeviceTables(NamedTuple):
    """What the device remembers between steps, by row; row 0 is trash."""

    block_tables: Tensor  # [rows, blocks of the longest sequence] int32
    last_token: Tensor  # [rows] int32, the last token sampled for the row
    sampling: Tensor  # [rows, 6] int32, see `pack_sampling`


class Staging:
    """The way to the device: arrays are packed into pinned memory and sent in one copy, which nobody waits for.

    Two host buffers take turns: what was sent from one is there, nearly always, long before it is filled again.
    Arrays of the same sizes arrive at the same addresses, which is what a CUDA graph reads.
    """

    def __init__(self, capacity: int, device: torch.device):
        pin = device.type == "cuda"
        self.host = [torch.zeros(capacity, dtype=torch.int32, pin_memory=pin) for _ in range(2)]
        self.sent = [torch.cuda.Event() for _ in self.host] if pin else []
        self.device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.turn = 0

    def upload(self, *groups: list[INT]) -> list[list[Tensor]]:
        """Send groups of int32 arrays of any shapes; returns where each array will be on the device."""
        self.turn = 1 - self.turn
        host = self.host[self.turn]
        if self.sent:
            self.sent[self.turn].synchronize()
        buffer = host.numpy()
        views: list[list[Tensor]] = []
        end = 0
        for arrays in groups:
            views.append([])
            for array in arrays:
                start = -(-end // 4) * 4  # 16 bytes: kernels are compiled for aligned pointers
                end = start + array.size
                buffer[start:end] = array.reshape(-1)
                views[-1].append(self.device[start:end].view(array.shape))
        self.device[:end].copy_(host[:end], non_blocking=True)
        if self.sent:
            self.sent[self.turn].record()
        return views


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor of any size and type to the device without waiting: pinned memory is reused after the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class HostBatch(NamedTuple):
    """A batch on the CPU, on its way. `arrays` are rows, context_lens, query_lens and the attention plan; for chunks then
    input_ids [T], positions [T] and token_rows [T], the row of each token."""

    is_decode: bool
    arrays: list[INT]

    def on_device(self, views: list[Tensor], tables: DeviceTables, block_size: int) -> Batch:
        """The batch whose arrays arrived as `views`. What can be derived is derived on the device."""
        rows, context_lens, _ = views[:3]
        if self.is_decode:
            plan, token_rows = views[3:], rows
            input_ids, positions = tables.last_token.index_select(0, rows), context_lens - 1
        else:
            plan = views[3:-3]
            input_ids, positions, token_rows = views[-3:]
        places = token_rows * tables.block_tables.shape[1] + positions // block_size
        blocks = tables.block_tables.view(-1).index_select(0, places)
        return Batch(
            is_decode=self.is_decode,
            input_ids=input_ids,
            positions=positions,
            slot_mapping=blocks.long() * block_size + positions % block_size,
            rows=rows,
            context_lens=context_lens,
            block_tables=tables.block_tables,
            block_size=block_size,
            query_lens=self.arrays[2],
            cpu_context_lens=self.arrays[1],
            plan=plan,
        )


class PackedStep(NamedTuple):
    """All that a rank must know to compute a step, the decode rows first."""

    decodes: list[INT]  # the arrays of a HostBatch of decode rows, with padding; none without rows
    # What the tables have to learn: places and blocks [E]; rows [R] and their sampling parameters [R, 6]
    updates: list[INT]
    chunks: list[INT]  # the arrays of a HostBatch of chunks; none without chunks
    # Rows and positions [S] of the tokens to be drawn; the last tokens [C] of the chunks after which one is drawn
    sampled: list[INT]
    # Slices of prompts whose log-probabilities are read: [P, 3] of the first hidden state, their number, how many of the
    # most likely tokens; and the tokens whose log-probabilities they are, one after the other
    prompt_reads: list[INT]

    def to_bytes(self) -> bytes:
        return marshal.dumps([[(array.shape, array.tobytes()) for array in arrays] for arrays in self])

    @classmethod
    def from_bytes(cls, message: bytes) -> "PackedStep":
        groups = marshal.loads(message)
        return cls(*([np.frombuffer(data, np.int32).reshape(shape) for shape, data in g] for g in groups))


def pack_decodes(sequences: list[Sequence], context_lens: list[int], size: int, backend: AttentionBackend) -> HostBatch:
    """Decode rows, filled up to `size` with rows of the trash sequence, whose one token is in block 0."""
    num_padding = size - len(sequences)
    rows = int32([seq.row for seq in sequences] + [0] * num_padding)
    lens = int32(context_lens + [1] * num_padding)
    query_lens = np.ones(size, np.int32)
    plan = backend.plan(True, query_lens, lens)
    return HostBatch(True, [rows, lens, query_lens, *plan])


def pack_chunks(chunks: list[ScheduledChunk], num_padding: int, backend: AttentionBackend) -> HostBatch:
    """Chunks of prompts, and where there is padding a chunk of the trash sequence at the end."""
    rows = [chunk.seq.row for chunk in chunks]
    starts = [chunk.start for chunk in chunks]
    lens = [chunk.num_tokens for chunk in chunks]
    input_ids = [t for seq, start, n, _ in chunks for t in seq.token_ids[start : start + n]]
    if num_padding:
        rows, starts, lens = [*rows, 0], [*starts, 0], [*lens, num_padding]
        input_ids += [0] * num_padding
    query_lens, first = int32(lens), int32(starts)
    offsets = query_lens.cumsum() - query_lens
    positions = np.arange(len(input_ids)) + np.repeat(first - offsets, query_lens)
    token_rows = np.repeat(int32(rows), query_lens)
    context_lens = first + query_lens
    plan = backend.plan(False, query_lens, context_lens)
    tokens = [int32(input_ids), int32(positions), token_rows]
    return HostBatch(False, [int32(rows), context_lens, query_lens, *plan, *tokens])


def int32(values: ArrayLike) -> INT:
    return np.asarray(values, np.int32)
