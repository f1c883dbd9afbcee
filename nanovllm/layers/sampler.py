"""The sampler: from logits to token ids, greedy and random in one path.

A token is drawn by the Gumbel-max trick: the arg max of logits + temperature · Gumbel noise has the distribution of
softmax(logits / temperature), and at temperature 0 it is the greedy token. The noise is a pure function of (seed,
position, vocabulary id): it is the same for a request in any batch, and on any number of devices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm import kernels
from nanovllm.sampling_params import SamplingParams

SAMPLING = np.dtype("f4, f4, f4, i4, i8")  # see `pack_sampling`


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
    least = None
    if batch.is_truncated:
        from nanovllm.extras.truncation import least_kept

        least = least_kept(logits, batch)
    if logits.is_cuda and kernels.AVAILABLE:
        from nanovllm.kernels.gumbel import gumbel_max

        return gumbel_max(logits, least, batch.rows, batch.positions, batch.sampling, last_token)
    token_ids = draw(logits, least, batch)
    last_token[batch.rows] = token_ids.clamp(min=0).int()
    return token_ids


def draw(logits: Tensor, least: Tensor | None, batch: SamplingBatch) -> Tensor:
    """The Gumbel-max trick in plain PyTorch, among the logits that are at least `least` [S]; int64 [S]. The twin of
    `kernels.gumbel.gumbel_max`."""
    if batch.is_random:
        logits = logits.float()
        if least is not None:
            logits = logits.masked_fill(logits < least.unsqueeze(1), -torch.inf)
        temperature, _, _, _, seeds = batch.unpack()
        noise = gumbel_noise(seeds, batch.positions, logits.shape[1])
        logits = torch.addcmul(logits, noise, temperature.unsqueeze(1))
    highest = logits.max(dim=-1)  # a NaN if there is one; argmax takes 4 times as long on a CPU
    return highest.indices.masked_fill_(~(highest.values > -torch.inf), -1)


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
