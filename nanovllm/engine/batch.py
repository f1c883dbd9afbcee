"""Batch: what one step hands to the model: views of one packed tensor on the device, and the counts the CPU knows."""

from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.scheduler import Step
from nanovllm.engine.sequence import Sequence


class DeviceTables(NamedTuple):
    """What the device remembers between steps, by row; row 0 is trash."""

    block_tables: Tensor  # [rows, blocks of the longest sequence] int32
    last_token: Tensor  # [rows] int32, the last token sampled for the row


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it: pinned memory is reused only after the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class Batch:
    """T tokens of B sequences, decode rows first; S sequences reach their end. Tensors are on the device.

    Decode rows have one token each, and it is their sequence's last. `attention` is what the attention backend's
    `prepare` made of this batch.
    """

    input_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slot_mapping: Tensor  # [T] int64, where each token's KV goes: block * block_size + offset
    block_tables: Tensor  # [B, blocks of the longest context] int32
    context_lens: Tensor  # [B] int32, tokens to attend to: those cached and this step's
    logits_indices: Tensor  # [S] int32, the tokens whose logits are wanted
    block_size: int
    num_decodes: int
    query_lens: list[int]  # [B] tokens of this step
    cpu_context_lens: list[int]  # [B]
    attention: Any = None

    @classmethod
    def from_step(cls, step: Step, tables: DeviceTables, block_size: int) -> "Batch":
        """Send what the device must know of `step` in one copy, and derive the rest there.

        The packed parts are input_ids [T] (0 for decode rows, whose tokens the device has), positions [T], the row
        of each token [T], rows [B], context_lens [B], logits_indices [S], and row, index and block of each new
        block-table entry [E].
        """
        input_ids: list[int] = []
        positions: list[int] = []
        token_rows: list[int] = []
        rows: list[int] = []
        context_lens: list[int] = []
        logits_indices: list[int] = []
        for seq, start, num_tokens, is_decode, is_sampled in step.scheduled:
            end = start + num_tokens
            if is_decode:
                input_ids.append(0)
                positions.append(start)
                token_rows.append(seq.row)
            else:
                input_ids += seq.token_ids[start:end]
                positions += range(start, end)
                token_rows += [seq.row] * num_tokens
            rows.append(seq.row)
            context_lens.append(end)
            if is_sampled:
                logits_indices.append(len(positions) - 1)
        updates = [list(column) for column in zip(*step.block_updates, strict=True)] or [[], [], []]
        parts = [input_ids, positions, token_rows, rows, context_lens, logits_indices, *updates]
        packed = upload(
            torch.tensor([*chain.from_iterable(parts)], dtype=torch.int32), tables.block_tables.device
        )
        d_input_ids, d_positions, d_token_rows, d_rows, d_context_lens, d_logits_indices, *d_updates = (
            packed.split([len(part) for part in parts])
        )
        update_rows, update_indices, update_blocks = d_updates
        tables.block_tables[update_rows, update_indices] = update_blocks
        num_decodes = step.num_decode_tokens
        d_input_ids[:num_decodes] = tables.last_token[d_rows[:num_decodes]]
        slots = (
            tables.block_tables[d_token_rows, d_positions // block_size] * block_size
            + d_positions % block_size
        )
        return cls(
            input_ids=d_input_ids,
            positions=d_positions,
            slot_mapping=slots.long(),
            block_tables=tables.block_tables[d_rows, : -(-max(context_lens) // block_size)],
            context_lens=d_context_lens,
            logits_indices=d_logits_indices,
            block_size=block_size,
            num_decodes=num_decodes,
            query_lens=[s.num_tokens for s in step.scheduled],
            cpu_context_lens=context_lens,
        )


@dataclass
class SamplingBatch:
    """How the next tokens of S sequences are drawn. Tensors are on the device; the flags say what can be left out."""

    logits_rows: Tensor  # [S] int64, which of the step's logits
    rows: Tensor  # [S] int64, the sequences' rows
    seeds: Tensor  # [S] int64
    positions: Tensor  # [S] int64, the index in the sequence of the token that is drawn
    top_k: Tensor  # [S] int64, at least 1
    temperature: Tensor  # [S] float32
    top_p: Tensor  # [S] float32
    min_p: Tensor  # [S] float32
    banned: Tensor  # [2, N] int64: (which of the S, token id)
    is_random: bool  # some temperature is not 0
    is_truncated: bool  # some top_k, top_p or min_p is in use

    @classmethod
    def from_sequences(
        cls, sequences: list[Sequence], logits_rows: list[int], vocab_size: int, device: torch.device
    ) -> "SamplingBatch":
        """Every token of `sequences` must be known: noise and bans depend on where the next one stands."""
        params = [seq.params for seq in sequences]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        integers = [
            logits_rows,
            [seq.row for seq in sequences],
            [seq.seed for seq in sequences],
            [len(seq.token_ids) for seq in sequences],
            top_k,
        ]
        floats = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        banned = [(i, token_id) for i, seq in enumerate(sequences) for token_id in seq.banned_token_ids]
        d_logits_rows, d_rows, d_seeds, d_positions, d_top_k = upload(torch.tensor(integers), device)
        d_temperature, d_top_p, d_min_p = upload(torch.tensor(floats, dtype=torch.float32), device)
        return cls(
            logits_rows=d_logits_rows,
            rows=d_rows,
            seeds=d_seeds,
            positions=d_positions,
            top_k=d_top_k,
            temperature=d_temperature,
            top_p=d_top_p,
            min_p=d_min_p,
            banned=upload(torch.tensor(banned, dtype=torch.int64).view(-1, 2).t(), device),
            is_random=any(p.temperature > 0 for p in params),
            is_truncated=any(
                p.temperature > 0 and (k < vocab_size or p.top_p < 1 or p.min_p > 0)
                for p, k in zip(params, top_k, strict=True)
            ),
        )
