"""What decode rows are computed from, looked up in the device's tables by one launch.

The twin is what `DeviceTables.decode_inputs` does on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def decode_inputs(
    rows: Tensor, context_lens: Tensor, last_token: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' last tokens and their positions, int32 [B], and their slots, int64 [B]."""
    input_ids, positions = torch.empty_like(rows), torch.empty_like(rows)
    slots = torch.empty_like(rows, dtype=torch.int64)
    decode_inputs_kernel[(triton.cdiv(len(rows), 128),)](
        rows, context_lens, last_token, block_tables, block_tables.stride(0), input_ids, positions, slots, len(rows),
        BLOCK_SIZE=block_size, BLOCK=128,
    )  # fmt: skip
    return input_ids, positions, slots


@triton.jit(do_not_specialize=["num_rows"])
def decode_inputs_kernel(
    rows, context_lens, last_token, block_tables, table_stride, input_ids, positions, slots, num_rows,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < num_rows
    row = tl.load(rows + i, mask=live, other=0)
    position = tl.load(context_lens + i, mask=live, other=1) - 1
    tl.store(input_ids + i, tl.load(last_token + row), mask=live)
    tl.store(positions + i, position, mask=live)
    block = tl.load(block_tables + row.to(tl.int64) * table_stride + position // BLOCK_SIZE)
    tl.store(slots + i, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, mask=live)
