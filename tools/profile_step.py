"""Where one step goes: every kernel of a replayed CUDA graph, or of a step full of prompts, and of the head and the sampler after
it.

    python tools/profile_step.py --shape qwen3-0.6b --context 800 --rows 256 128 64 16 2
    python tools/profile_step.py --shape qwen3-0.6b --rows --prompts 4096 1024

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
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 64, 8], help="steps of so many decode rows")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="steps full of prompts of so many tokens")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="rank 0 is shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[args.shape].save(Path(folder))
        llm = LLM(
            folder,
            load_format="dummy",
            max_num_seqs=max([64, *args.rows]),
            max_model_len=max([args.context, *(length + 1 for length in args.prompts)]),
            attention_backend=args.attention_backend,
            tensor_parallel_size=args.tensor_parallel_size,
            use_tqdm=False,
        )
    runner = llm.engine.runner
    for num_rows in args.rows:
        step = decode_step(runner, num_rows, args.context)
        profile(llm.engine, step, f"{num_rows} rows of {args.context} tokens")
    for length in args.prompts:
        num_prompts = max(1, min(64, llm.config.max_num_batched_tokens // length))
        profile(llm.engine, prompt_step(runner, num_prompts, length), f"{num_prompts} prompts of {length} tokens")
    llm.close()


def profile(engine: Any, step: Step, name: str) -> None:
    """Print the time of a step and its kernels, the costliest first, in microseconds a step."""
    run = lambda: engine.runner.sample(engine._launch((engine.runner.pack(step), step)))  # noqa: E731
    run()
    step.block_updates, step.admitted = [], []
    print(f"{name}: {milliseconds(run):.3f} ms a step")
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
    """A step of `num_rows` rows of `context` tokens, with the block tables that it sets."""
    step = new_step(runner, num_rows, context, [0])
    step.decodes = [ScheduledChunk(seq, context - 1, 1, is_sampled=True) for seq in step.admitted]
    return step


def prompt_step(runner: Any, num_prompts: int, length: int) -> Step:
    """A step of whole prompts."""
    step = new_step(runner, num_prompts, length, [0] * length)
    step.chunks = [ScheduledChunk(seq, 0, length, is_sampled=True) for seq in step.admitted]
    return step


def new_step(runner: Any, num_rows: int, num_tokens: int, token_ids: list[int]) -> Step:
    """A step that admits sequences, whose blocks lie scattered over the pool."""
    num_blocks = -(-num_tokens // runner.block_size)
    blocks = iter((torch.randperm(runner.num_blocks - 1) + 1).tolist())
    rows = range(1, num_rows + 1)
    params = SamplingParams(temperature=0.6)
    return Step(
        block_updates=[(row, i, next(blocks)) for row in rows for i in range(num_blocks)],
        admitted=[Sequence(row, array("i", token_ids), params, seed=row, max_tokens=1, row=row) for row in rows],
    )


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
