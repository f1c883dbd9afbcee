"""Token embedding, with the vocabulary cut between the ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.distributed import Group, Share


def vocabulary_share(vocab_size: int, group: Group) -> Share:
    """This rank's tokens, as many on every rank: the last ones may have tokens that no vocabulary has."""
    size = -(-vocab_size // group.size)
    return Share(group.rank * size, size, vocab_size)


class ParallelEmbedding(nn.Module):
    """A rank's rows of W [vocabulary, hidden]; for tokens of other ranks it adds nothing to the sum."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, group: Group):
        super().__init__()
        self.share = vocabulary_share(vocab_size, group)
        self.group = group
        self.weight = nn.Parameter(torch.empty(self.share.size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        if not self.group.is_connected:
            return F.embedding(token_ids, self.weight)  # [T, hidden]
        token_ids = token_ids - self.share.start
        is_other = (token_ids < 0) | (token_ids >= self.share.size)
        x = F.embedding(token_ids.masked_fill(is_other, 0), self.weight)
        return self.group.all_reduce(x.masked_fill(is_other.unsqueeze(1), 0))
