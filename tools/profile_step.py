"""Where one step goes: every kernel of a replayed CUDA graph, or of a step full of prompts, and of what is launched after it.

    python tools/profile_step.py --rows 1 256 --prompts 16384 --save steps.json     # needs a GPU
    python tools/profile_step.py --draw steps.json docs/steps.svg     # needs matplotlib

Random weights; the rows' blocks lie scattered over the pool. A kernel counts from the end of the one before it: some begin early and
wait for that one.
"""

import argparse
import json
import re
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
from tools.plot import new_figure
from tools.shapes import SHAPES

REPEATS = 20
SHOWN = 12
GROUPS = {  # a kernel is of the first that its name fits
    "upload": "Memcpy HtoD",
    "attention": "attention|flash|FlashAttention",
    "rotary and KV store": "norm_rotate_store",
    "products": "product_kernel|nvjet|gemm|gemv|cutlass|splitK",
    "sampler": "gumbel|unpack_kernel|Memcpy DtoH",
    "all else": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--context", type=int, default=800, help="tokens of every row (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 64, 8], help="steps of so many decode rows")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="steps full of prompts of so many tokens")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="rank 0 is shown")
    parser.add_argument("--save", type=Path, help="JSON file for --draw")
    parser.add_argument(
        "--draw", type=Path, nargs=2, metavar=("JSON", "PICTURE"), help="draw what was saved, and no more"
    )
    args = parser.parse_args()
    if args.draw:
        return draw(json.loads(args.draw[0].read_text()), args.draw[1])
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
    steps = {
        f"{n} row{'s' * (n > 1)} of {args.context} tokens": decode_step(runner, n, args.context) for n in args.rows
    }
    for length in args.prompts:
        n = max(1, min(64, llm.config.max_num_batched_tokens // length))
        steps[f"{n} prompt{'s' * (n > 1)} of {length} tokens"] = prompt_step(runner, n, length)
    found = {name: profile(llm.engine, step, name) for name, step in steps.items()}
    if args.save:
        args.save.write_text(json.dumps(found) + "\n")
    llm.close()


def profile(engine: Any, step: Step, name: str) -> dict[str, float]:
    """Print the time of a step and its kernels, the costliest first, in microseconds a step; returns those of each group."""
    run = lambda: engine.runner.sample(engine._launch((engine.runner.pack(step), step)))  # noqa: E731
    run()
    step.block_updates, step.admitted = [], []
    print(f"{name}: {milliseconds(run):.3f} ms a step")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    on_device = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels: dict[str, list[float]] = defaultdict(list)
    groups = dict.fromkeys(GROUPS, 0.0)
    last_end = float("inf")
    for event in sorted(on_device, key=lambda event: event.time_range.end):
        end = event.time_range.end
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, event.name))
        # Before the upload the device waits for the CPU, which the profiler slows down.
        began = event.time_range.start if group == "upload" else min(last_end, end)
        kernels[event.name].append(end - began)
        groups[group] += (end - began) / REPEATS
        last_end = end
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        calls = len(times) / REPEATS
        print(f"  {sum(times) / REPEATS:9.1f} us = {calls:5.1f} x {sum(times) / len(times):7.2f}  {name[:80]}")
    return groups


def draw(found: dict[str, dict[str, float]], picture: Path) -> None:
    """A bar for each step, of its groups' shares."""
    figure = new_figure(1)
    figure.set_size_inches(9, 1.2 + 0.6 * len(found))
    axes = figure.subplots()
    names = [f"{name}\n{sum(groups.values()) / 1000:.2f} ms" for name, groups in found.items()]
    starts = [0.0] * len(found)
    for group in GROUPS:
        shares = [100 * groups[group] / sum(groups.values()) for groups in found.values()]
        axes.barh(names, shares, left=starts, label=group)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="% of a step", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(picture)


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
    """Median time from an idle device to the last kernel, packing and launching included."""
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
