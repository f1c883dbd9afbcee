"""How much memory the KV pool may take, on CUDA and on the host: readings, and arithmetic with them."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

GIB = 2**30


def gib(num_bytes: float) -> str:
    return f"{max(num_bytes, 0) / GIB:.2f} GiB"


class CudaMemory:
    """A GPU's memory, of which this process takes a part from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.empty_cache()
        free, self.total = torch.cuda.mem_get_info(device)
        self.available = free + torch.cuda.memory_reserved(device)

    def peak_of(self, run: Callable[[], None]) -> int:
        """What PyTorch takes while `run` runs, beside what it has."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        run()
        return torch.cuda.max_memory_reserved(self.device) - reserved

    def pool_bytes(self, utilization: float, peak: int, asked: int | None) -> int:
        """`pool_bytes` by this device's readings."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        held = max(torch.cuda.memory_reserved(self.device), self.available - free)  # or more, outside of PyTorch
        logger.info("this process holds %s, a step takes %s", gib(held), gib(peak))
        return pool_bytes(self.total, free, utilization, held, peak, asked)


def pool_bytes(total: int, free: int, utilization: float, held: int, peak: int, asked: int | None = None) -> int:
    """Bytes for the KV pool: `asked`, or the share of the card that is ours, less what this process holds and a step's peak.

    Args:
        total, free: the card's memory, and what no process has taken of it.
        utilization: our share of `total`. What other processes hold is not part of it.
        held: what this process has taken so far, weights included.
        peak: what the largest step takes beside that.

    Raises:
        ValueError: the share leaves nothing, or the pool is more than is free, with the figures.
    """
    pool = int(total * utilization) - held - peak if asked is None else asked
    if 0 < pool <= free - peak:
        return pool
    option = "gpu_memory_utilization" if asked is None else "num_kvcache_blocks"
    problem, remedy = f"the KV cache would take {gib(pool)}, but only {gib(free - peak)} are free", f"lower {option}"
    if pool <= 0:
        problem = "no memory is left for the KV cache"
        remedy = "raise gpu_memory_utilization or tensor_parallel_size"
    raise ValueError(
        f"{problem}: gpu_memory_utilization={utilization} of {gib(total)} is {gib(total * utilization)}, of which this process "
        f"holds {gib(held)} and a step takes {gib(peak)}; other processes hold {gib(total - free - held)}; {remedy}"
    )


def check_weights_fit(weights: int, total: int, utilization: float, num_ranks: int) -> None:
    """ValueError unless `weights` bytes on each of so many cards of `total` bytes fit into our share; it says how many
    ranks it takes."""
    enough = math.ceil(weights * num_ranks / (total * utilization))
    if enough > num_ranks:
        raise ValueError(
            f"the weights take {gib(weights)} on each of {num_ranks} GPUs, of whose {gib(total)} "
            f"gpu_memory_utilization={utilization} is {gib(total * utilization)}; tensor_parallel_size must be at least {enough}"
        )


def available_host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: what the machine has available, or less under a cgroup's limit."""
    available = psutil.virtual_memory().available
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with suppress(OSError):  # another version's file
            limit, usage = ((cgroup / name).read_text().strip() for name in names)
            if limit != "max":
                available = min(available, max(0, int(limit) - int(usage)))
    return available
