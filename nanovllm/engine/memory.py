"""How much memory the KV pool may take, on CUDA and on the host. Pure arithmetic beside the readings."""

from pathlib import Path

import psutil

GIB = 2**30


def cuda_pool_bytes(total: int, free: int, utilization: float, held: int, peak: int) -> int:
    """Bytes for the KV pool: the share of the card that is ours, less what this process holds and a step's peak.

    Args:
        total, free: the card's memory, and what no process has taken of it.
        utilization: our share of `total`. What other processes hold is not part of it.
        held: what this process has taken so far, weights included.
        peak: what the largest step takes beside that.

    Raises:
        ValueError: the share leaves nothing, or more than is free, with the figures.
    """
    pool = int(total * utilization) - held - peak
    split = (
        f"gpu_memory_utilization={utilization} of {total / GIB:.2f} GiB is {total * utilization / GIB:.2f} GiB, of which "
        f"this process holds {held / GIB:.2f} GiB and a step takes {peak / GIB:.2f} GiB"
    )
    if pool <= 0:
        raise ValueError(
            f"no memory is left for the KV cache: {split}; raise gpu_memory_utilization or tensor_parallel_size"
        )
    if pool + peak > free:
        raise ValueError(
            f"the KV cache would take {pool / GIB:.2f} GiB, but only {max(free - peak, 0) / GIB:.2f} GiB are free: "
            f"{split}; other processes hold {max(total - free - held, 0) / GIB:.2f} GiB; lower gpu_memory_utilization"
        )
    return pool


def check_weights_fit(weights: int, total: int, utilization: float, num_ranks: int) -> None:
    """ValueError unless `weights` bytes on each of so many cards of `total` bytes fit into our share; it says how many
    ranks would do."""
    enough = num_ranks
    while weights * num_ranks / enough > total * utilization:
        enough *= 2
    if enough > num_ranks:
        raise ValueError(
            f"the weights take {weights / GIB:.2f} GiB on each of {num_ranks} GPUs, of whose {total / GIB:.2f} GiB "
            f"gpu_memory_utilization={utilization} is {total * utilization / GIB:.2f} GiB; tensor_parallel_size={enough} would fit"
        )


def available_host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: what the machine has available, or less under a cgroup's limit."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = ((cgroup / limit_file).read_text().strip(), (cgroup / usage_file).read_text().strip())
        except OSError:
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - int(usage)))
    return available
