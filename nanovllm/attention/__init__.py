"""Attention backends: how queries meet the paged KV cache. `select` picks one; the decoder is handed it."""

import logging

import torch

from nanovllm import kernels
from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.config import ModelConfig

__all__ = ["AttentionBackend", "select"]

logger = logging.getLogger(__name__)


def select(
    name: str | AttentionBackend, config: ModelConfig, device: torch.device, block_size: int | None = None
) -> AttentionBackend:
    """The backend called `name` for a model, or `name` if it is one. "auto" is the fastest: on a GPU flash-attn-4 where it is
    installed and runs, else Triton; elsewhere the reference.

    Raises:
        ValueError: the backend is not installed, or runs no such model, device or `block_size`.
    """
    if not isinstance(name, str):
        return name
    is_auto = name == "auto"
    if is_auto:
        on_gpu = device.type == "cuda" and kernels.AVAILABLE and config.head_dim <= kernels.MAX_HEAD_DIM
        name = "triton" if on_gpu else "reference"
    if name == "reference":
        return ReferenceAttention()
    if not kernels.AVAILABLE:
        raise ValueError(
            f"attention_backend={name!r} needs the package triton, which is not installed; 'auto' takes what is there"
        )
    from nanovllm.attention import flash
    from nanovllm.attention.triton import TritonAttention

    if name == "flash-attn":
        return flash.FlashAttention(config, device, block_size)
    if is_auto and flash.installed_version(device) == 4:
        try:
            return flash.FlashAttention(config, device, block_size)
        except ValueError as error:
            logger.warning("flash-attn-4 is installed and not used: %s", error)
    return TritonAttention(config, device, block_size)
