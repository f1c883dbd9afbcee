"""The sampler: from logits to token ids, greedy and random in one path.

A token is drawn by the Gumbel-max trick: the arg max of logits + temperature · Gumbel noise has the distribution of
softmax(logits / temperature), and at temperature 0 it is the greedy token. The noise is a pure function of (seed,
position, vocabulary id): a request has the same luck whatever batch it is in, and on any number of devices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm import kernels
from nanovllm.sampling_params import SamplingParams

SAMPLING = np.dtype("f4, f4, f4, i4, i8")  # see `pack_sampling`
GROUP = 128  # columns among whose maxima the largest logits are looked for


def pack_sampling(params: SamplingParams, seed: int, vocab_size: int) -> NDArray[np.int32]:
    """What the device keeps of a request, int32 [6]: temperature, top_p and min_p as the bits of float32, top_k (at
    least 1), and the two halves of the seed."""
    top_k = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
    return np.array([(params.temperature, params.top_p, params.min_p, top_k, seed)], SAMPLING).view(np.int32)


@dataclass
class SamplingBatch:
    """How the next tokens of S sequences are drawn."""

    sampling: Tensor  # [rows, 6] int32, see `pack_sampling`
    rows: Tensor  # [S] int32, of `sampling`
    positions: Tensor  # [S], the index in the sequence of the token that is drawn
    is_random: bool  # some temperature is not 0
    is_truncated: bool  # some top_k, top_p or min_p is in use

    def unpack(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """temperature, top_p and min_p [S] float32, top_k [S] int32 and seeds [S] int64."""
        packed = self.sampling.index_select(0, self.rows)
        temperature, top_p, min_p = packed.view(torch.float32)[:, :3].unbind(1)
        return temperature, top_p, min_p, packed[:, 3], packed.view(torch.int64)[:, 2]


def sample(logits: Tensor, batch: SamplingBatch, last_token: Tensor) -> Tensor:
    """Draw a token for each row of logits [S, vocabulary]; [S]. On a tie the lowest token id wins.

    A row from which none can be drawn, because one logit is NaN or all are -inf, has -1. The tokens are also written to
    `last_token[batch.rows]`, 0 for -1: the next step may read them before anybody knows.
    """
    if logits.is_cuda and kernels.AVAILABLE:
        from nanovllm.kernels import gumbel, truncation

        least = truncation.least_kept(logits, batch.rows, batch.sampling) if batch.is_truncated else None
        return gumbel.gumbel_max(logits, least, batch.rows, batch.positions, batch.sampling, last_token)
    token_ids = draw(logits, batch)
    last_token[batch.rows] = token_ids.clamp(min=0).int()
    return token_ids


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The Gumbel-max trick in plain PyTorch, the twin of `kernels.gumbel.gumbel_max`; int64 [S]."""
    if batch.is_random:
        logits = logits.float()
        if batch.is_truncated:
            logits = logits.masked_fill(logits < least_kept(logits, batch).unsqueeze(1), -torch.inf)
        temperature, _, _, _, seeds = batch.unpack()
        noise = gumbel_noise(seeds, batch.positions, logits.shape[1])
        logits = torch.addcmul(logits, noise, temperature.unsqueeze(1))
    highest = logits.max(dim=-1)  # a NaN if there is one; argmax takes 4 times as long on a CPU
    return highest.indices.masked_fill_(~(highest.values > -torch.inf), -1)


def least_kept(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The lowest logit of each row that min-p, then top-k, then top-p keep, each of what the one before kept; ties are
    kept. -inf where the row is greedy. The twin of `kernels.truncation.least_kept`; float32 [S]."""
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


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise [S, vocab_size] float32 for int64 `seeds` and `positions` [S].

    A key of 64 bits for each row (splitmix64's finaliser, Steele et al. 2014), then for each column two rounds of a 32-bit
    integer hash (lowbias32, Wellons), of which 31 bits make a uniform v; -log(-log(1 - v)). Taking 1 - v keeps the
    finest steps where the noise is largest; the clamp keeps v, which may round to 1, from making it infinite.
    """
    key = _mix64(_mix64(seeds) + positions)
    low, high = key.to(torch.int32).unsqueeze(1), (key >> 32).to(torch.int32).unsqueeze(1)
    columns = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    uniform = (_mix32(_mix32(columns ^ low) ^ high) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _mix64(x: Tensor) -> Tensor:
    x = x + -0x61C8864680B583EB  # the golden ratio, 2^64 / φ, as a signed number
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of raw logits [R, vocabulary]: of `token_ids` [R], with their ranks (1 is the most likely), and
    the `num_top` largest with their token ids: float32 [R], int [R], float32 [R, num_top], int64 [R, num_top]."""
    drawn = logits.gather(1, token_ids.unsqueeze(1))
    if logits.is_cuda and kernels.AVAILABLE:
        from nanovllm.kernels import logprobs

        norm, rank = logprobs.norm_and_rank(logits, drawn)
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
    least `drawn` [R, 1], int64 [R]. The twin of `kernels.logprobs.norm_and_rank`."""
    return torch.logsumexp(logits.float(), dim=-1, keepdim=True), (logits >= drawn).sum(dim=-1)
