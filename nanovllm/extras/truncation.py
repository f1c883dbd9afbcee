"""Truncation: min-p, top-k and top-p, as the lowest logit that they keep."""

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers.sampler import SamplingBatch


def least_kept(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The lowest logit of each row of logits [S, vocabulary] that min-p, then top-k, then top-p keep, each of what the one
    before kept; ties are kept. -inf where the row is greedy; float32 [S]."""
    if logits.is_cuda and kernels.AVAILABLE:
        from nanovllm.extras import truncation_kernel

        return truncation_kernel.least_kept(logits, batch.rows, batch.sampling)
    return least_kept_by_sorting(logits, batch)


def least_kept_by_sorting(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The same in plain PyTorch, the twin of `truncation_kernel.least_kept`."""
    temperature, top_p, min_p, top_k, _ = batch.unpack()
    is_random = temperature > 0
    values = logits.float().sort(dim=-1, descending=True).values
    # From the maximum down, so that a tiny temperature cannot overflow.
    weights = ((values - values[:, :1]) / temperature.masked_fill(~is_random, 1.0).unsqueeze(1)).exp()
    alive = (values > -torch.inf) & (weights >= min_p.unsqueeze(1))
    last = torch.minimum(top_k, alive.sum(dim=-1)).sub(1).clamp(min=0).unsqueeze(1)
    alive &= values >= values.gather(1, last)
    mass = weights.masked_fill(~alive, 0.0).cumsum(dim=-1)
    target = torch.where(top_p < 1, top_p * mass[:, -1], torch.inf)  # rounding must not cut the tail at 1
    num_below = (mass < target.unsqueeze(1)).sum(dim=-1)
    last = torch.minimum(num_below, alive.sum(dim=-1) - 1).clamp(min=0).unsqueeze(1)
    return torch.where(is_random, values.gather(1, last).squeeze(1), -torch.inf)
