"""The seam between the decoder and attention: how queries, keys and values meet the paged KV cache."""

from typing import Any

from torch import Tensor
from torch.nn import RMSNorm

from nanovllm.engine.batch import INT, Batch, PackedBatch
from nanovllm.engine.shared_prefixes import SharedRuns
from nanovllm.layers.rotary import Rotary, apply_rotary


class AttentionBackend:
    """What the decoder asks of attention. A custom backend needs only `attend`.

    T tokens, B sequences, H query heads, H_kv key-value heads, D the head size. In a batch either every sequence has
    one token (`batch.is_decode`) or each has a chunk of its prompt, after what the cache holds of it.
    """

    block_size = 16  # tokens in a KV block, unless the user asks for another
    # Whether decode rows may run in a CUDA graph: then no launch may depend on the values of lengths.
    capturable = False

    # Decode rows share KV in runs of a multiple of so many tokens; with 0, each reads its own.
    shared_tokens = 0

    def plan(self, batch: PackedBatch, shared: SharedRuns | None) -> list[INT]:
        """Arrays that the device needs for this batch, made on the CPU; they arrive as `batch.work_list`. `shared` says which KV
        decode rows have in common; chunks have None.

        For decode rows of a capturable backend their shapes depend on the number of rows alone.
        """
        return []

    def prepare(self, batch: Batch) -> Any:
        """What the layers of this step share; they find it as `batch.attn_metadata`. Must not synchronise."""

    def store(
        self,
        qkv: Tensor,
        norms: tuple[RMSNorm, RMSNorm] | None,
        rotary: Rotary,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Normalise and rotate q and k, and write k and v to their slots in the caches [blocks, block_size, H_kv, D];
        returns q [T, H, D]. May overwrite qkv [T, H + 2 H_kv, D]. `norms` are those of q and k, and `rotary` is for the
        tokens' positions."""
        num_kv_heads = k_cache.shape[2]
        q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        k_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, apply_rotary(k, *rotary))
        v_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, v)
        return apply_rotary(q, *rotary)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        """Causal attention of q [T, H, D], scaled by D^-0.5, to each token's own sequence; [T, H, D]."""
        raise NotImplementedError
