"""Linear layers of few rows, which take as long as reading their weights. The twins are in `layers.linear`.

The norm before the product and the gate after it are done in its kernel. A kernel may begin while the one before it still runs
(programmatic dependent launch): its weights are on their way when what it multiplies them with is ready.
"""

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
    first half of the product's columns goes through SiLU and is multiplied with the other half.
    """
    num_rows, in_features = x.shape
    num_outputs = len(weight) // (2 if is_gated else 1)
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    sizes = tile(num_rows, in_features, num_outputs, is_gated, x.dtype)
    product_kernel[(triton.cdiv(num_outputs, sizes["N"]),)](
        x, x if residual is None else residual, total, x if norm is None else norm.weight, weight,
        weight if bias is None else bias, y, num_rows, num_outputs, 0.0 if norm is None else norm.eps, K=in_features,
        HAS_NORM=norm is not None, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        **sizes, **dependent_launch(num_rows),
    )  # fmt: skip
    return y, total


def most_rows(in_features: int, dtype: torch.dtype) -> int:
    """Up to how many rows this kernel takes a product with so many columns.

    For more than one row, a program's weights wait in shared memory. Other GPUs than Hopper's have less of it, or were not tried, and
    for more columns even Hopper's have too little.
    """
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return FEW_ROWS if is_hopper and dtype.itemsize == 2 and in_features <= 3072 else 1


def tile(num_rows: int, in_features: int, num_outputs: int, is_gated: bool, dtype: torch.dtype) -> dict[str, Any]:
    """R: rows, at least 8 where the matrix units multiply them. N: outputs of a program. CHUNK: columns that it takes at once, cut into
    SLICES, one for each warp. And launch options.

    On an H200 with Qwen3-0.6B's sizes 8 warps are 5 to 40 % slower, and for two rows multiply-adds 10 % slower than matrix units.
    """
    outputs = 4 if is_gated else 8
    if num_rows > 1:
        outputs = 32 if num_rows <= 8 and not is_gated and num_outputs >= 4096 else 16
    else:  # one program's weights are in registers
        while outputs > 1 and outputs * (2 if is_gated else 1) * in_features * dtype.itemsize > 2**14 * 3:
            outputs //= 2
    return {
        "R": 1 if num_rows == 1 else 8 if num_rows <= 8 else 16,
        "N": outputs, "CHUNK": max(64, min(1024, triton.next_power_of_2(in_features))), "SLICES": 4, "num_warps": 4,
    }  # fmt: skip


@triton.jit
def load_weights(
    w, num_outputs, first: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr
):  # fmt: skip
    """Columns first … first+CHUNK-1 of this program's outputs: [SLICES, N, CHUNK / SLICES]."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = first + columns(CHUNK, SLICES)
    mask = (n < num_outputs)[None, :, None] & (k < K) if first + CHUNK > K else (n < num_outputs)[None, :, None]
    return tl.load(w + n.to(tl.int64)[None, :, None] * K + k, mask=mask, other=0.0, eviction_policy="evict_first")


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
    """N outputs of all rows. All weights are loaded first."""
    NUM_CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    NUM_PARTS: tl.constexpr = 2 if IS_GATED else 1
    weights = ()
    for part in tl.static_range(NUM_PARTS):
        for i in tl.static_range(NUM_CHUNKS):
            of_part = w + (part * num_outputs).to(tl.int64) * K
            weights = weights + (load_weights(of_part, num_outputs, i * CHUNK, N, K, CHUNK, SLICES),)
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    rows = tl.arange(0, R)
    n = tl.program_id(0) * N + tl.arange(0, N)
    xs = ()
    squares = tl.zeros([R], tl.float32)
    for i in tl.static_range(NUM_CHUNKS):
        chunk = load_rows(x, residual, total, rows, num_rows, i * CHUNK, K, CHUNK, SLICES, HAS_RESIDUAL)
        if HAS_NORM:
            squares += tl.sum(tl.sum(chunk.to(tl.float32) * chunk.to(tl.float32), 2), 0)
        xs = xs + (chunk,)
    if HAS_NORM:
        scale = tl.rsqrt(squares / K + eps)[None, :, None]
    results = ()
    for part in tl.static_range(NUM_PARTS):
        y = tl.zeros([SLICES, N, R], tl.float32)
        for i in tl.static_range(NUM_CHUNKS):
            chunk = xs[i]
            if HAS_NORM:
                k = i * CHUNK + columns(CHUNK, SLICES)
                factor = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
                chunk = (chunk.to(tl.float32) * scale * factor).to(chunk.dtype)
            weight = weights[part * NUM_CHUNKS + i]
            if R > 1:
                y = tl.dot(weight, tl.trans(chunk, 0, 2, 1), y, input_precision="ieee")
            else:
                y += tl.sum(chunk.to(tl.float32) * weight.to(tl.float32), 2, keep_dims=True)
        y = tl.trans(tl.sum(y, 0))
        if HAS_BIAS:
            y += tl.load(bias + part * num_outputs + n, mask=n < num_outputs, other=0.0).to(tl.float32)[None, :]
        results = results + (y.to(out.dtype.element_ty),)
    y = results[0]
    if IS_GATED:
        gate = y.to(tl.float32)
        y = (gate * tl.sigmoid(gate) * results[1].to(tl.float32)).to(out.dtype.element_ty)
    mask = (rows < num_rows)[:, None] & (n < num_outputs)[None, :]
    tl.store(out + rows[:, None] * num_outputs + n[None, :], y, mask=mask)
