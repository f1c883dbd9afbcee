"""Rotary position embedding (Su et al., arXiv 2104.09864), its scalings for longer contexts, and its application."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.config import RopeConfig

Rotary = tuple[Tensor, Tensor]  # cosines and sines of the tokens' positions, [T, 1, head_dim] float32 each


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """The angle per position of each pair of dimensions, float32 [head_dim / 2], and a factor for cos and sin."""
    inv_freq = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    p = rope.parameters
    if rope.type == "linear":  # kaiokendev's position interpolation, Chen et al., arXiv 2306.15595
        return inv_freq / p["factor"], 1.0
    if rope.type == "llama3":  # Llama 3's: slow dimensions interpolated, fast ones kept, a ramp between
        turns = p["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # over the original context
        kept = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
        return torch.lerp(inv_freq / p["factor"], inv_freq, kept.clamp(0, 1)), 1.0
    if rope.type == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return inv_freq, 1.0


def _yarn(inv_freq: Tensor, rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): the ramp is over the dimensions that turn beta_slow … beta_fast times."""
    p = rope.parameters

    def dimension(turns: float) -> float:
        """Which pair of dimensions turns so often over the original context."""
        length = p["original_max_position_embeddings"] / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))
    scaled = torch.lerp(inv_freq, inv_freq / p["factor"], ramp.clamp(0, 1))

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if "attention_factor" in p:
        return scaled, float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return scaled, magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return scaled, magnitude(1.0)


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
        cos, sin = F.embedding(positions, self.table).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [T, heads, D] by their tokens' angles: x cos + (x, halves swapped) sin."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
