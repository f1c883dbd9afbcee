"""Linear layers and the embedding, whole or cut between the ranks; their weights know their names in a checkpoint."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.parallel.group import Group, Share


class Linear(nn.Module):
    """y = x Wᵀ + b with W [out, in], unfilled: the loader fills it.

    Where it is gated, as in SwiGLU (Shazeer, arXiv 2002.05202), the first half of y goes through SiLU and is multiplied with the
    other half.
    """

    max_few_rows = 0  # up to so many rows, one kernel does the norm, the product and the gate

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, is_gated: bool = False):
        super().__init__()
        self.is_gated = is_gated
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def after_norm(self, norm: nn.RMSNorm, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What this layer makes of norm(x + residual), and x + residual."""
        if self.are_few(x) and type(norm) is nn.RMSNorm:  # and not a norm of one's own
            from nanovllm.kernels.few_rows import product

            return product(x, self.weight, self.bias, self.is_gated, norm, residual)
        if residual is not None:
            x = x + residual
        return self(norm(x)), x

    def are_few(self, x: Tensor) -> bool:
        """Whether the kernel of few rows takes x; never where torch.compile looks on, which is for many."""
        return not torch.compiler.is_compiling() and 0 < len(x) <= self.max_few_rows

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.are_few(x):
            from nanovllm.kernels.few_rows import product

            return product(x, self.weight, bias, self.is_gated)[0]
        if self.weight.is_mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, bias)
        if self.is_gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y

    def reorder_for_cpu(self) -> None:
        """Reorder the weight, once filled, into oneDNN's blocked layout, where this CPU has fast products for it.

        With 16 rows on 2 cores (AVX-512) bfloat16 products take 0.6 of the time, float32 ones 0.4.
        """
        if not torch.backends.mkldnn.is_available():
            return
        onednn = torch.ops.mkldnn
        is_fast = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
        if self.weight.dtype == torch.float32 or is_fast[self.weight.dtype]():
            packed = onednn._reorder_linear_weight(self.weight, None)
            self.weight = nn.Parameter(packed, requires_grad=False)


def limit_onednn_caches() -> None:
    """Have oneDNN, and PyTorch's layer over it, keep fewer kernels, unless the environment says how many.

    They make a kernel for every number of rows, and keep 1,024 each: a gigabyte. This must come before the first product.
    With 128 a tiny model's memory is level at 540 MB, where it was 1,080 after 300 mixed calls, and as fast.
    """
    for name in "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY":
        os.environ.setdefault(name, "128")


class ColumnParallelLinear(Linear):
    """Linear layers on the same input as one product; `parts` maps their names to the outputs that this rank computes."""

    def __init__(
        self, in_features: int, parts: dict[str, Share], bias: bool, dtype: torch.dtype, is_gated: bool = False
    ):
        super().__init__(in_features, sum(share.size for share in parts.values()), bias, dtype, is_gated)
        self.parts = parts


class RowParallelLinear(Linear):
    """A linear layer of whose input each rank has a share; their outputs are added up."""

    def __init__(self, share: Share, out_features: int, bias: bool, dtype: torch.dtype, group: Group):
        super().__init__(share.size, out_features, bias, dtype)
        self.share = share
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.bias if self.group.rank == 0 else None)
        # asked here: a call of `all_reduce` would cut a compiled layer in two
        return self.group.all_reduce(y) if self.group.is_connected else y


def vocabulary_share(vocab_size: int, group: Group) -> Share:
    """This rank's tokens, padded to an equal number on every rank: the rows at the end are unused."""
    size = -(-vocab_size // group.size)
    return Share(group.rank * size, size, vocab_size)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table, as by F.embedding, which on a GPU takes up to 16 of them one after the other."""
    one_by_one = table.is_cuda and 1 < len(indices) <= 16
    return table[indices] if one_by_one else F.embedding(indices, table)


class ParallelEmbedding(nn.Module):
    """A rank's rows of W [vocabulary, hidden]; for tokens of other ranks it adds nothing to the sum."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, group: Group):
        super().__init__()
        self.share = vocabulary_share(vocab_size, group)
        self.group = group
        self.weight = nn.Parameter(torch.empty(self.share.size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        if not self.group.is_connected:
            return look_up(self.weight, token_ids)  # [T, hidden]
        token_ids = token_ids - self.share.start
        is_other = (token_ids < 0) | (token_ids >= self.share.size)
        x = look_up(self.weight, token_ids.masked_fill(is_other, 0))
        return self.group.all_reduce(x.masked_fill(is_other.unsqueeze(1), 0))
