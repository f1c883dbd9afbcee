"""What log-probabilities need of whole rows of logits, in one pass. The twin is `logprobs.norm_and_rank`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
LOWEST = tl.constexpr(-3.4e38)  # finite: -inf less -inf would be NaN


def norm_and_rank(logits: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """As the twin; norms float32 [R, 1], ranks int32 [R]."""
    num_rows, vocab_size = logits.shape
    norm = torch.empty(num_rows, 1, dtype=torch.float32, device=logits.device)
    rank = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    norm_and_rank_kernel[(num_rows,)](
        logits, logits.stride(0), vocab_size, drawn, norm, rank, BLOCK=BLOCK, num_warps=16
    )
    return norm, rank


@triton.jit
def norm_and_rank_kernel(logits, stride, vocab_size, drawn, norm, rank, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    own = tl.load(drawn + r).to(tl.float32)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocab_size
        x = tl.load(logits + r * stride + column, mask=live, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, x)
        total = total * tl.exp(highest - new) + tl.exp(x - new)
        highest = new
        count += (live & (x >= own)).to(tl.int32)
    top = tl.max(highest, 0)
    tl.store(norm + r, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))
    tl.store(rank + r, tl.sum(count, 0))
