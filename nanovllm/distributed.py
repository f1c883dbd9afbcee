"""Tensor parallelism (Megatron-LM, Shoeybi et al., arXiv 1909.08053): the ranks of one model as its layers see them.

All ranks launch the same collectives in the same order, over NCCL or gloo. No process group of torch.distributed is made:
there is one of those to a process, and it may be the user's.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm import kernels

if TYPE_CHECKING:
    from nanovllm.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)  # for a rank that is slower than the others to start, or to load its weights

CPU = torch.device("cpu")


class Share(NamedTuple):
    """A rank's part of one dimension of a tensor: `size` entries from `start` on, of `total`."""

    start: int
    size: int
    total: int


def wait_for(store: dist.Store, keys: list[str], check: Callable[[], None]) -> None:
    """Until others have set the keys, or `check` raises."""
    while not store.check(keys):
        check()
        time.sleep(0.01)


def call_and_check(function: Callable[[dist.Store], Any], store: dist.Store, check: Callable[[], None]) -> Any:
    """What the function returns, in a thread of its own, which is left behind if `check` raises first."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(store))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    while not wait([future], 0.1).done:
        check()
    return future.result()


class Group:
    """One of the `size` ranks, with its device. Until it is connected, as one rank alone need not be, it does nothing."""

    def __init__(self, device: torch.device = CPU, rank: int = 0, size: int = 1):
        self.device = device
        self.rank = rank
        self.size = size
        self.backend: Any = None
        self.peer_memory: PeerMemory | None = None

    def connect(self, store: dist.Store, check: Callable[[], None] = lambda: None) -> None:
        """Join the other ranks, which do the same at the same store. What `check` raises ends the waiting for them."""
        store.set(f"rank {self.rank}", "is here")
        wait_for(store, [f"rank {rank}" for rank in range(self.size)], check)
        self.backend = call_and_check(self._new_backend, store, check)
        if self.device.type == "cuda" and kernels.AVAILABLE and self.size > 1:
            self._share_memory(store, check)

    def share(self, count: int, unit: int = 1) -> Share:
        """This rank's part of `count` things of `unit` entries; of fewer things than ranks, several have the same."""
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
        """The least of all ranks' values; waits for them."""
        if not self.is_connected:
            return value
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        least = torch.tensor([value], device=self.device)
        self.backend.allreduce([least], options).wait()
        return int(least.item())

    def abort(self) -> None:
        """End kernels that wait for a rank which will not come. gloo sees by itself that a connection is closed."""
        if self.peer_memory is not None:
            self.peer_memory.stop[0] = 1
        if self.is_connected and self.device.type == "cuda":
            self.backend.abort()

    def close(self) -> None:
        """Leave the group, when nothing that was launched is left."""
        self.abort()
        self.backend = None  # gloo's threads end here, and not while the interpreter does
        if self.peer_memory is not None:
            self.peer_memory.close()
            self.peer_memory = None

    def _new_backend(self, store: dist.Store) -> Any:
        """Waits for the other ranks, as long as it takes: nothing ends it if one dies."""
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, self.size, TIMEOUT)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        with torch.cuda.device(self.device):
            backend = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            backend.eager_connect_single_device(self.device)
        return backend

    def _share_memory(self, store: dist.Store, check: Callable[[], None]) -> None:
        """All ranks do, or none."""
        from nanovllm.peer_memory import PeerMemory

        memory = PeerMemory(self.device, self.rank, self.size)
        can_share = True
        try:
            memory.open(store, check)
        except OSError as error:
            logger.info("rank %d: small sums go through NCCL too: %s", self.rank, error)
            can_share = False
        if self.least(can_share):
            self.peer_memory = memory
        else:
            memory.close()
