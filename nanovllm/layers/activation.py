"""The gated activation of the feed-forward layers (SwiGLU, Shazeer, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [gate, up], halves of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
