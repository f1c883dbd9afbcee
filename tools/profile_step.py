"""Where one decode step goes: every kernel of a replayed CUDA graph, and of the head and the sampler after it.

    python tools/profile_step.py --shape qwen3-0.6b --context 800 --rows 256 128 64 16 2

Needs a GPU. Random weights; the rows' blocks lie scattered over the pool.
"""

import argparse
import sys
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import ScheduledChunk, Step
from nanovllm.engine.sequence import Sequence
from tools.shapes import SHAPES

REPEATS = 20
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--context", type=int, default=800, help="tokens of every row (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 64, 8])
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="rank 0 is shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[args.shape].save(Path(folder))
        llm = LLM(
            folder,
            load_format="dummy",
            max_num_seqs=max(args.rows),
            max_model_len=args.context,
            attention_backend=args.attention_backend,
            tensor_parallel_size=args.tensor_parallel_size,
            use_tqdm=False,
        )
    for num_rows in args.rows:
        profile(llm.engine, num_rows, args.context)
    llm.close()


def profile(engine: Any, num_rows: int, context: int) -> None:
    """Print the time of a step and its kernels, the costliest first, in microseconds a step."""
    step = decode_step(engine.runner, num_rows, context)
    run = lambda: engine.runner.sample(engine.forward(step))  # noqa: E731
    run()
    step.block_updates, step.admitted = [], []
    print(f"{num_rows} rows of {context} tokens: {milliseconds(run):.3f} ms a step")
    kernels: dict[str, list[float]] = defaultdict(list)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.device_time_total)
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        calls = len(times) / REPEATS
        print(f"  {sum(times) / REPEATS:9.1f} us = {calls:5.1f} x {sum(times) / len(times):7.2f}  {name[:80]}")


def decode_step(runner: Any, num_rows: int, context: int) -> Step:
    """A step of `num_rows` rows whose block tables, which it sets, hold `context` tokens."""
    num_blocks = -(-context // runner.block_size)
    blocks = iter((torch.randperm(runner.num_blocks - 1) + 1).tolist())
    step = Step()
    step.block_updates = [(row, i, next(blocks)) for row in range(1, num_rows + 1) for i in range(num_blocks)]
    for row in range(1, num_rows + 1):
        seq = Sequence(row, array("i", [0]), SamplingParams(temperature=0.6), seed=row, max_tokens=1, row=row)
        step.admitted.append(seq)
        step.decodes.append(ScheduledChunk(seq, context - 1, 1, is_sampled=True))
    return step


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time on the device."""
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


if __name__ == "__main__":
    main()
