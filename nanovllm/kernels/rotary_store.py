"""q/k-norm, rotary embedding and the KV store in one pass over q, k and v. The twin is `AttentionBackend.store`."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import RMSNorm

from nanovllm.engine.batch import Batch
from nanovllm.kernels import dependent_launch
from nanovllm.layers.rotary import Rotary


def norm_rotate_store(
    qkv: Tensor, norms: tuple[RMSNorm, RMSNorm] | None, rotary: Rotary, k_cache: Tensor, v_cache: Tensor, batch: Batch
) -> Tensor:
    """As `AttentionBackend.store`; q is done in place, in float32 to the end, and returned as a view of qkv."""
    num_tokens, num_heads, head_dim = qkv.shape
    num_kv_heads = k_cache.shape[2]
    num_q_heads = num_heads - 2 * num_kv_heads
    q_norm, k_norm, eps = (norms[0].weight, norms[1].weight, norms[0].eps) if norms else (qkv, qkv, 0.0)
    norm_rotate_store_kernel[(num_tokens,)](
        qkv, q_norm, k_norm, *rotary, batch.slot_mapping, k_cache, v_cache, rotary[0].stride(0), eps,
        H=num_q_heads, H_KV=num_kv_heads, D=head_dim, HEADS=triton.next_power_of_2(num_heads),
        HALF=triton.next_power_of_2(head_dim // 2), HAS_NORM=norms is not None,
        num_warps=4 if num_heads * head_dim <= 4096 else 8, **dependent_launch(num_tokens),
    )  # fmt: skip
    return qkv[:, :num_q_heads]


@triton.jit
def norm_rotate_store_kernel(
    qkv, q_norm, k_norm, cos_ptr, sin_ptr, slots, k_cache, v_cache, cos_stride, eps,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program does one token: all heads, each as its two halves, which the rotation turns against each other."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    live = (head < H + 2 * H_KV) & (i < D // 2)
    if HAS_NORM:  # loaded before the wait, as no kernel writes them
        weight = tl.where(head < H, q_norm, k_norm) + i
        x_weight = tl.load(weight, mask=live, other=0.0).to(tl.float32)
        y_weight = tl.load(weight + D // 2, mask=live, other=0.0).to(tl.float32)
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = qkv + token * ((H + 2 * H_KV) * D) + head * D + i
    first = tl.load(at, mask=live, other=0.0)
    second = tl.load(at + D // 2, mask=live, other=0.0)
    column = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < D // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * cos_stride + D // 2 + column, mask=column < D // 2, other=0.0)[None, :]
    slot = tl.load(slots + token) * H_KV
    x, y = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
        x = x * scale * x_weight
        y = y * scale * y_weight
    is_v = head >= H + H_KV
    cache_at = tl.where(is_v, v_cache + (slot + head - H - H_KV) * D, k_cache + (slot + head - H) * D) + i
    at = tl.where(head < H, at, cache_at)
    tl.store(at, tl.where(is_v, first, (x * cos - y * sin).to(first.dtype)), mask=live)
    tl.store(at + D // 2, tl.where(is_v, second, (y * cos + x * sin).to(first.dtype)), mask=live)
