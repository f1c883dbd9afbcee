"""Tensor parallelism (Megatron-LM, Shoeybi et al., arXiv 1909.08053): the ranks of one model as its layers see them.

All ranks launch the same collectives in the same order, over NCCL or gloo. No process group of torch.distributed is made:
there is one of those to a process, and it may be the user's.
"""

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm import kernels

if TYPE_CHECKING:
    from nanovllm.parallel.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)  # for a rank that is slower than the others to start, or to load its weights

CPU = torch.device("cpu")


class Share(NamedTuple):
    """A rank's part of one dimension of a tensor: `size` entries from `start` on, of `total`."""

    start: int
    size: int
    total: int


class Group:
    """One of the `size` ranks, with its device. A group of one rank is never connected, and does nothing."""

    def __init__(self, device: torch.device = CPU, rank: int = 0, size: int = 1):
        self.device = device
        self.rank = rank
        self.size = size
        self.backend: Any = None
        self.peer_memory: PeerMemory | None = None
        self.is_aborted = False

    def connect(self, store: dist.Store) -> None:
        """Join the other ranks, which do the same at the same store."""
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self.backend = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            self.backend.eager_connect_single_device(self.device)
            if kernels.AVAILABLE and self.size > 1:
                self._share_memory(store)
        else:
            self.backend = dist.ProcessGroupGloo(store, self.rank, self.size, TIMEOUT)

    def share(self, count: int, unit: int = 1) -> Share:
        """This rank's part of `count` things of `unit` entries; with fewer things than ranks, several ranks have the same."""
        size = max(1, count // self.size)
        return Share(self.rank * count // self.size * unit, size * unit, count * unit)

    @property
    def is_connected(self) -> bool:
        return self.backend is not None

    @torch.compiler.disable
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, contiguous, in place."""
        if self.peer_memory is not None and self.peer_memory.fits(x):
            self.peer_memory.all_reduce(x)
        else:
            self.backend.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x [S, n] side by side on rank 0, [S, size * n]; elsewhere x itself."""
        if not self.is_connected:
            return x
        parts = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        self.backend.gather(parts, [x.contiguous()], dist.GatherOptions()).wait()
        return torch.cat(parts[0], dim=1) if parts else x

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x with rank 0's."""
        if self.is_connected:
            self.backend.broadcast([x], dist.BroadcastOptions()).wait()

    def least(self, value: int) -> int:
        """The least of all ranks' values; waits for them. RuntimeError if an abort has ended that wait."""
        tensor = torch.tensor(int(value), device=self.device)
        if self.is_connected:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
            self.backend.allreduce([tensor], options).wait()
        least = int(tensor)
        if self.is_aborted:
            raise RuntimeError("a rank has failed")
        return least

    def abort(self) -> None:
        """End kernels that wait for a rank which will not come. gloo sees by itself that a connection is closed."""
        self.is_aborted = True
        backend, peer_memory = self.backend, self.peer_memory  # which another thread may be closing
        if peer_memory is not None:
            peer_memory.stop[0] = 1
        if backend is not None and self.device.type == "cuda":
            backend.abort()

    def close(self) -> None:
        """Leave the group, when nothing that was launched is left."""
        self.abort()
        self.backend = None  # gloo's threads end here, and not while the interpreter does
        if self.peer_memory is not None:
            self.peer_memory.close()
            self.peer_memory = None

    def _share_memory(self, store: dist.Store) -> None:
        """All ranks do, or none."""
        from nanovllm.parallel.peer_memory import PeerMemory

        memory = self.peer_memory = PeerMemory(self.device, self.rank, self.size)  # closed with the group
        can_share = True
        try:
            memory.open(store)
        except OSError as error:
            logger.info("rank %d: small sums go through NCCL too: %s", self.rank, error)
            can_share = False
        if not self.least(can_share):
            self.peer_memory = None
            memory.close()
