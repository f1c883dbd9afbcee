"""CUDA graphs of decode steps: hundreds of launches replayed as one, in a few sizes to which steps are padded."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def graph_sizes(least: int, max_num_seqs: int) -> list[int]:
    """Numbers of rows to capture, ascending, from 1 or 2 on: in steps of 8 up to 64, then of at most an eighth."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_num_seqs:
        sizes.append(sizes[-1] + max(8, 2 ** (sizes[-1].bit_length() - 4)))
    return [size for size in sizes if least <= size < max_num_seqs] + [max(least, max_num_seqs)]


class DecodeGraphs:
    """Captured decode steps, if there are any. They share their memory: what one returns is gone when another is replayed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # ascending
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self.pool: Any = None

    def capture(self, size: int, decode: Callable[[], Any]) -> None:
        """Capture what computes a decode step of so many rows. The largest size is the first: the others fit into its memory."""
        try:
            decode()  # compiles, loads and allocates what a capture must not
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            stream = _capture_stream(torch.cuda.current_device())
            # NCCL's own thread goes on asking about earlier work meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                results = decode()
            self.graphs[size] = graph, results
            self.sizes.insert(0, size)
        except BaseException:
            self.close()
            raise

    def padded_size(self, num_rows: int) -> int:
        """What so many rows are padded to; none stay none."""
        return self.sizes[bisect_left(self.sizes, num_rows)] if self.sizes and num_rows else num_rows

    def replay(self, size: int) -> Any:
        """Launch a captured step; what `decode` returned."""
        graph, results = self.graphs[size]
        graph.replay()
        return results

    def close(self) -> None:
        """Free the graphs: NCCL's communicators cannot be ended before graphs that use them."""
        for graph, _ in self.graphs.values():
            graph.reset()


@cache
def _capture_stream(device_index: int) -> torch.cuda.Stream:
    """torch has one capture stream for all devices, made on the first one that captures. Each device needs its own."""
    return torch.cuda.Stream(device_index)


def graph_bytes(start: Callable[[int], Callable[[], Any]], sizes: list[int], device: torch.device) -> int:
    """What graphs of `sizes` will take, by capturing what `start` returns for three: the largest's memory, which all share, and
    a fixed cost for each of the others."""

    def free_bytes() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    graphs, free = DecodeGraphs(), [free_bytes()]
    for size in reversed(sizes[-3:]):
        graphs.capture(size, start(size))
        free.append(free_bytes())
    del graphs
    torch.cuda.empty_cache()
    largest, others = free[0] - free[1], free[1] - free[-1]
    return largest + max(0, others) * (len(sizes) - 1) // max(1, len(free) - 2)
