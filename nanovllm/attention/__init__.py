"""Attention backends: how queries meet the paged KV cache. `select` picks one; the decoder is handed it."""

from importlib.util import find_spec

import torch

from nanovllm import kernels
from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.config import ModelConfig

__all__ = ["AttentionBackend", "select"]


def select(
    name: str | AttentionBackend, config: ModelConfig, device: torch.device, block_size: int | None = None
) -> AttentionBackend:
    """The backend called `name` for a model, or `name` if it is one; "auto" is the fastest: Triton on a GPU, else the
    reference.

    Raises:
        ValueError: the backend is not installed, or runs no such model, device or `block_size`.
    """
    if not isinstance(name, str):
        return name
    if name == "auto":
        on_gpu = device.type == "cuda" and kernels.AVAILABLE and config.head_dim <= kernels.MAX_HEAD_DIM
        name = "triton" if on_gpu else "reference"
    if name == "reference":
        return ReferenceAttention()
    installed = {"triton": kernels.AVAILABLE, "flash-attn": find_spec("flash_attn") is not None}
    for package in ("triton", name):  # flash-attn stores with a Triton kernel
        if not installed[package]:
            raise ValueError(
                f"attention_backend={name!r} needs the package {package}, which is not installed; "
                "'auto' takes what is there"
            )
    if name == "triton":
        from nanovllm.attention.triton import TritonAttention

        return TritonAttention(config, device)
    from nanovllm.attention.flash import FlashAttention

    return FlashAttention(config, device, block_size)
