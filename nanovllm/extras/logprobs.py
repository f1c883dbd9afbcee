"""Log-probabilities of tokens, their ranks, and the most likely tokens in their places."""

import torch
from torch import Tensor

from nanovllm import kernels

GROUP = 128  # columns among whose maxima the largest logits are looked for


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of raw logits [R, vocabulary]: of `token_ids` [R], with their ranks (1 is the most likely), and
    the `num_top` largest with their token ids: float32 [R], int [R], float32 [R, num_top], int64 [R, num_top]."""
    drawn = logits.gather(1, token_ids.unsqueeze(1))
    if logits.is_cuda and kernels.AVAILABLE:
        from nanovllm.extras import logprobs_kernel

        norm, rank = logprobs_kernel.norm_and_rank(logits, drawn)
    else:
        norm, rank = norm_and_rank(logits, drawn)
    by_groups = logits.is_cuda and len(logits) >= 64 and num_top <= GROUP and logits.shape[1] % GROUP == 0
    top, top_ids = largest_by_groups(logits, num_top) if by_groups else logits.topk(num_top, dim=-1)
    return (drawn.float() - norm).squeeze(1), rank, top.float() - norm, top_ids


def largest_by_groups(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """As topk over logits [R, n * GROUP], which takes twice as long for many rows: the `num` largest are in the `num`
    groups of columns that have the largest maxima."""
    groups = logits.unflatten(1, (-1, GROUP))
    chosen = groups.amax(-1).topk(min(num, groups.shape[1]), sorted=False).indices
    candidates = groups.gather(1, chosen.unsqueeze(2).expand(-1, -1, GROUP)).flatten(1)
    top = candidates.topk(num)
    return top.values, chosen.gather(1, top.indices // GROUP) * GROUP + top.indices % GROUP


def norm_and_rank(logits: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits [R, vocabulary] the log of the sum of exponentials, float32 [R, 1], and how many of them are at
    least `drawn` [R, 1], int64 [R]. The twin of `logprobs_kernel.norm_and_rank`."""
    return torch.logsumexp(logits.float(), dim=-1, keepdim=True), (logits >= drawn).sum(dim=-1)
