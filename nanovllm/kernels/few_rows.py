"""Linear layers of few rows, which take as long as reading their weights. The twins are in `layers.linear`.

The norm before the product and the gate after it are done in its kernel. A kernel may begin while the one before it still runs
(programmatic dependent launch): its weights are on their way when what it multiplies them with is ready.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import RMSNorm

from nanovllm.kernels import FEW_ROWS, dependent_launch


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_gated: bool,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """W x + b for each row of x [R, in], and x; W is [out, in].

    With a residual, x + residual is in the place of x. With a norm, its output is what is multiplied. Where it is gated, the
    first half of the outputs goes through SiLU and is multiplied with the other half.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    num_rows, in_features = x.shape
    num_outputs = len(weight) // (2 if is_gated else 1)
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    sizes = tile(num_rows, in_features, norm is not None, is_gated, x.dtype)
    product_kernel[(triton.cdiv(len(weight), sizes["N"]),)](
        x, x if residual is None else residual, total, x if norm is None else norm.weight, weight,
        weight if bias is None else bias, y, num_rows, num_outputs, 0.0 if norm is None else norm.eps, K=in_features,
        HAS_NORM=norm is not None, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        **sizes, **dependent_launch(num_rows),
    )  # fmt: skip
    return y, total


def most_rows(in_features: int, dtype: torch.dtype, has_norm: bool = False) -> int:
    """The most rows that this kernel takes where W has `in_features` columns.

    For more than one row, a program's weights wait in shared memory, and what a norm before it makes of the rows in registers. Other
    GPUs than Hopper's have less of both, or were not tried. Of more columns a program takes so much that none runs beside it: on an
    H200 a gate and up of 1,536 or 2,048 columns take 1.7 to 2 times as long as by the libraries.
    """
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return FEW_ROWS if is_hopper and dtype.itemsize == 2 and in_features <= (1024 if has_norm else 3072) else 1


def tile(num_rows: int, in_features: int, has_norm: bool, is_gated: bool, dtype: torch.dtype) -> dict[str, Any]:
    """R: rows, at least 8 where the matrix units multiply them. N: rows of W for a program. CHUNK: columns that it takes at once, cut
    into SLICES, one for each warp. And launch options.

    As measured on an H200 with the sizes of Qwen3-0.6B and 8B and of Llama-3.2-1B. Slices of fewer than 256 columns are 5 to 40 %
    slower, and for two rows multiply-adds 10 % slower than matrix units.
    """
    outputs, chunk, warps = 8, max(64, min(1024, triton.next_power_of_2(in_features))), 4
    if num_rows > 1:
        outputs = 32 if has_norm else 16
    else:  # one program's weights are in registers
        while outputs > 1 + is_gated and outputs * in_features * dtype.itemsize > 2**14 * 3:
            outputs //= 2
        if has_norm:
            chunk = max(chunk, math.gcd(in_features, 4096))
        elif in_features >= 4096 and in_features % 2048 == 0:
            chunk, warps = 2048, 8
    rows = 1 if num_rows == 1 else 8 if num_rows <= 8 else 16
    return {"R": rows, "N": outputs, "CHUNK": chunk, "SLICES": warps, "num_warps": warps}


@triton.jit
def columns(CHUNK: tl.constexpr, SLICES: tl.constexpr):
    """0 … CHUNK-1 as [SLICES, 1, CHUNK / SLICES]."""
    size: tl.constexpr = CHUNK // SLICES
    return (tl.arange(0, SLICES) * size)[:, None, None] + tl.arange(0, size)[None, None, :]


@triton.jit
def load_rows(
    x, residual, total, rows, num_rows, first: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Columns first … first+CHUNK-1 of some rows of x: [SLICES, rows, CHUNK / SLICES]. A sum with the residual is stored by the first
    program."""
    k = first + columns(CHUNK, SLICES)
    live = (rows < num_rows)[None, :, None]
    mask = live & (k < K) if first + CHUNK > K else live
    at = rows[None, :, None] * K + k
    loaded = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        loaded = (loaded.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(loaded.dtype)
        tl.store(total + at, loaded, mask=mask & (tl.program_id(0) == 0))
    return loaded


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x, residual, total, norm, w, bias, out, num_rows, num_outputs, eps,
    K: tl.constexpr, R: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """N rows of W with all rows of x; where it is gated, as many of the first half as of the other. All weights are loaded first."""
    NUM_CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    OUTPUTS: tl.constexpr = N // 2 if IS_GATED else N
    X_FIRST: tl.constexpr = R > 8 and not HAS_NORM  # as x Wᵀ, which is faster there; elsewhere as W xᵀ
    rows = tl.arange(0, R)
    i = tl.arange(0, N)
    n = tl.program_id(0) * OUTPUTS + i % OUTPUTS
    weight_row = n + i // OUTPUTS * num_outputs
    live = n < num_outputs
    weights, factors = (), ()
    for chunk in tl.static_range(NUM_CHUNKS):
        k = chunk * CHUNK + columns(CHUNK, SLICES)
        mask = live[None, :, None] & (k < K) if (chunk + 1) * CHUNK > K else live[None, :, None]
        at = w + weight_row.to(tl.int64)[None, :, None] * K + k
        weights = weights + (tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"),)
        if HAS_NORM:
            factors = factors + (tl.load(norm + k, mask=k < K, other=0.0),)
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    xs = ()
    squares = tl.zeros([R], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        loaded = load_rows(x, residual, total, rows, num_rows, chunk * CHUNK, K, CHUNK, SLICES, HAS_RESIDUAL)
        if HAS_NORM:
            squares += tl.sum(tl.sum(loaded.to(tl.float32) * loaded.to(tl.float32), 2), 0)
        xs = xs + (loaded,)
    if HAS_NORM:
        scale = tl.rsqrt(squares / K + eps)[None, :, None]
    y = tl.zeros([SLICES, R, N] if X_FIRST else [SLICES, N, R], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        x_chunk = xs[chunk]
        if HAS_NORM:
            x_chunk = (x_chunk.to(tl.float32) * scale * factors[chunk].to(tl.float32)).to(x_chunk.dtype)
        if X_FIRST:
            y = tl.dot(x_chunk, tl.trans(weights[chunk], 0, 2, 1), y, input_precision="ieee")
        elif R > 1:
            y = tl.dot(weights[chunk], tl.trans(x_chunk, 0, 2, 1), y, input_precision="ieee")
        else:
            y += tl.sum(x_chunk.to(tl.float32) * weights[chunk].to(tl.float32), 2, keep_dims=True)
    y = tl.sum(y, 0)
    if not X_FIRST:
        y = tl.trans(y)
    if HAS_BIAS:
        y += tl.load(bias + weight_row, mask=live, other=0.0).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty)
    if IS_GATED:
        gate, up = tl.split(tl.trans(tl.reshape(y, [R, 2, OUTPUTS]), 0, 2, 1))
        gate = gate.to(tl.float32)
        y = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(out.dtype.element_ty)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = (rows < num_rows)[:, None] & (n < num_outputs)[None, :]
    tl.store(out + rows[:, None] * num_outputs + n[None, :], y, mask=mask)
