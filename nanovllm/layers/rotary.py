"""Rotary position embedding (Su et al., arXiv 2104.09864), its scalings for longer contexts, and its application."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.config import RopeConfig
from nanovllm.layers.linear import look_up

Rotary = tuple[Tensor, Tensor]  # cosines and sines of the tokens' positions, [T, 1, head_dim] float32 each


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """The angle per position of each pair of dimensions, float32 [head_dim / 2], and a factor for cos and sin."""
    if rope.type == "default":
        return rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    scaling = {"rope_type": rope.type, **rope.parameters}
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_theta=rope.theta, rope_scaling=scaling)
    return ROPE_INIT_FUNCTIONS[rope.type](config, torch.device("cpu"))


class RotaryEmbedding(nn.Module):
    """A table of cosines and sines for positions 0 … max_len-1, float32; rotation is done in float32 too."""

    table: Tensor  # [max_len, 2 head_dim]: cos, cos, -sin, sin

    def __init__(self, rope: RopeConfig, head_dim: int, max_len: int):
        super().__init__()
        with torch.device("cpu"):  # one table for every device
            inv_freq, factor = inverse_frequencies(rope, head_dim)
            angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            table = torch.cat((cos, cos, -sin, sin), dim=-1)
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: Tensor) -> Rotary:
        cos, sin = look_up(self.table, positions).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [T, heads, D] by their tokens' angles: x cos + (x, halves swapped) sin."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
