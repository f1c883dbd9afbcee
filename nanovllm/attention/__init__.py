"""Attention backends: how queries meet the paged KV cache. `select` picks one; the decoder is handed it.

A backend is told of a step once (`prepare`) and then, in every layer, stores the new keys and values and attends.
"""

from typing import Any, Protocol

from torch import Tensor

from nanovllm.attention.reference import ReferenceAttention
from nanovllm.engine.batch import Batch


class AttentionBackend(Protocol):
    """What the decoder asks of attention. T tokens, H query heads, H_kv key-value heads, D the head size."""

    def prepare(self, batch: Batch) -> Any:
        """What every layer of this step shares; the layers find it as `batch.attention`. Must not synchronise."""

    def store(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> None:
        """Write k and v [T, H_kv, D] to their slots in the caches [blocks, block_size, H_kv, D]."""

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        """Causal attention of q [T, H, D], scaled by D^-0.5, to each token's own sequence; [T, H, D]."""


BACKENDS: dict[str, type[AttentionBackend]] = {"reference": ReferenceAttention}


def select(name: str) -> AttentionBackend:
    """The backend called `name`; "auto" is the fastest that is there."""
    return BACKENDS["reference" if name == "auto" else name]()
