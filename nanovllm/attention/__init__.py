"""Attention backends: how queries meet the paged KV cache. `select` picks one; the decoder is handed it."""

from importlib.util import find_spec

import torch

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.config import ModelConfig

__all__ = ["AttentionBackend", "select"]


def select(name: str, config: ModelConfig, device: torch.device) -> AttentionBackend:
    """The backend called `name` for a model; "auto" is the fastest that is there: Triton on a GPU.

    Raises:
        ValueError: the backend is not installed, or does not run this model on this device.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" and find_spec("triton") else "reference"
    if name == "reference":
        return ReferenceAttention()
    if name == "triton":
        if find_spec("triton") is None:
            raise ValueError("attention_backend='triton' needs the package triton, which is not installed")
        from nanovllm.attention.triton import INTERPRETED, TritonAttention

        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(f"attention_backend='triton' needs a GPU, got device {str(device)!r}")
        return TritonAttention(config, device)
    if find_spec("flash_attn") is None:
        raise ValueError(
            "attention_backend='flash-attn' needs the package flash-attn, which is not installed: "
            "pip install flash-attn, or leave attention_backend at 'auto'"
        )
    from nanovllm.attention.flash import FlashAttention

    return FlashAttention(config, device)
