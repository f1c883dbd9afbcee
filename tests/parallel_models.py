"""Models that fail on one rank; workers import this module."""

from typing import Any

from torch import Tensor

from nanovllm.models.decoder import Decoder


class FailsAtStart(Decoder):
    def __init__(self, config: Any, backend: Any, group: Any, max_len: int):
        super().__init__(config, backend, group, max_len)
        if group.rank == 1:
            raise MemoryError("no room for this rank's weights")


class FailsInTheMiddle(Decoder):
    num_calls = 0

    def embed(self, input_ids: Tensor) -> Tensor:
        self.num_calls += 1
        if self.embed_tokens.group.rank == 1 and self.num_calls == 5:
            raise MemoryError("no room for this step")
        return super().embed(input_ids)
