"""Throughput of offline generation: random prompts, every output as long as it was asked for.

    python bench.py                                       # GPU: classic; CPU: 16 requests to the demo model
    python bench.py --workload classic single --passes 4
    python bench.py --workload long --shape qwen3-8b --plot run.png
    python bench.py --shape qwen3-32b --tensor-parallel-size 2    # or torchrun --nproc-per-node 2 bench.py …
    python bench.py --sampling '{"top_p": 0.9, "top_k": 50}'
    python bench.py --num-seqs 1 --input-len 32 32 --output-len 128 128 --baseline hf

The passes of a workload have the same lengths and fresh prompts, so that the prefix cache helps within a pass and not
across passes. Nothing warms up: the first pass is reported beside the later ones, which make the headline.

It prints tables for people and, last, one line of JSON.
"""

import json
import os
import platform
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from nanovllm import LLM, SamplingParams
from tools.bench_args import find_device, find_options, find_workloads, parse_args
from tools.ceiling import Ceilings, least_work, measure_ceilings
from tools.hf_baseline import run_transformers
from tools.plot import new_figure, plot
from tools.watchers import DeviceTimer, Trace, Turn, watched
from tools.workloads import Workload


def run_pass(llm: LLM, workload: Workload, pass_number: int, timer: DeviceTimer | None, trace: Trace | None) -> float:
    """Seconds; RuntimeError if an output is not as long as it was asked for."""
    prompts, output_lens = workload.requests(pass_number)
    sampling = {"temperature": workload.temperature, "ignore_eos": True} | workload.sampling
    params = [SamplingParams(max_tokens=n, n=workload.num_samples, **sampling) for n in output_lens]
    with watched(llm.engine, timer, trace):
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
    for i, (output, wanted) in enumerate(zip(outputs, output_lens, strict=True)):
        if (got := [len(sample.token_ids) for sample in output.outputs]) != [wanted] * workload.num_samples:
            raise RuntimeError(f"request {i} was asked for {wanted} tokens and gave {got}")
    return seconds


def run_workload(
    llm: LLM, workload: Workload, num_passes: int, ceilings: Ceilings | None, is_traced: bool
) -> tuple[dict[str, Any], list[Turn]]:
    """What the JSON says of a workload, and the turns of its last pass.

    Of "passes", each list has a figure for each pass. Without ceilings, it has no shares.
    """
    prompts, output_lens = workload.requests(0)
    num_prompt, num_output = sum(map(len, prompts)), workload.num_samples * sum(output_lens)
    timer = DeviceTimer(llm.config.torch_device) if ceilings else None
    seconds, busy_seconds = [], []
    for number in range(num_passes):
        trace = Trace(llm.engine) if is_traced else None
        seconds.append(run_pass(llm, workload, number, timer, trace))
        busy_seconds.append(sum(timer.take()) if timer else 0.0)
    passes = {
        "seconds": seconds,
        "output_tok_per_s": [num_output / s for s in seconds],
        "prompt_tok_per_s": [num_prompt / s for s in seconds],
    }
    report: dict[str, Any] = asdict(workload)
    report |= {"prompt_tokens": num_prompt, "output_tokens": num_output, "passes": passes}
    if ceilings:
        work = least_work(llm.engine.model_config, workload)
        limit = report["limit_seconds"] = ceilings.limit_seconds(work) / llm.config.tensor_parallel_size
        passes["share_of_limit"] = [limit / s for s in seconds]
        passes["gpu_busy_share"] = [busy / s for busy, s in zip(busy_seconds, seconds, strict=True)]
    later = sorted(range(1, num_passes) or [0], key=lambda i: seconds[i])
    for name, i in ("best", later[0]), ("worst", later[-1]):
        report[name] = {column: figures[i] for column, figures in passes.items()}
    report["first_to_best"] = seconds[0] / report["best"]["seconds"]
    return report, trace.turns if trace else []


def print_workload(name: str, report: dict[str, Any]) -> None:
    """A table with a row for each pass, and the headline."""
    passes, best, worst = report["passes"], report["best"], report["worst"]
    print(f"\n{name}: {report['prompt_tokens']:,} prompt tokens, {report['output_tokens']:,} output tokens")
    print("pass" + "".join(f"{column.replace('_', ' '):>18}" for column in passes))
    for number, figures in enumerate(zip(*passes.values(), strict=True), start=1):
        print(f"{number:>4}" + "".join(f"{figure:>18,.3f}" for figure in figures))
    line = f"best: {best['output_tok_per_s']:,.1f} output tok/s, {best['prompt_tok_per_s']:,.1f} prompt tok/s"
    if len(passes["seconds"]) > 1:
        line += f"; after the first pass, at least {worst['output_tok_per_s']:,.1f} output tok/s"
        line += f"; the first took {report['first_to_best']:.2f} times as long as the best"
    print(line, flush=True)


def describe(llm: LLM, args: Namespace) -> dict[str, Any]:
    """What runs, and on what."""
    device = llm.config.torch_device
    settings = {
        "model": args.model or Path(llm.config.model).name,
        "dtype": str(llm.engine.model_config.dtype).removeprefix("torch."),
        "max_model_len": llm.max_model_len,
        "num_kvcache_blocks": llm.stats()["num_kvcache_blocks"],
    }
    on_cpu = f"CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    versions = {"python": platform.python_version()} | {of.__name__: of.__version__ for of in (torch, transformers)}
    return {"settings": asdict(llm.config) | settings, "hardware": hardware, "versions": versions}


def main(argv: list[str] | None = None) -> None:
    """Run the workloads that the command line asks for, and print what they took."""
    args = parse_args(argv, __doc__)
    device = find_device(args)
    on_gpu = device.type == "cuda"
    workloads = find_workloads(args, on_gpu)
    num_passes = args.passes or (2 if "custom" in workloads else 3)
    figure = new_figure(len(workloads)) if args.plot else None
    turns = {}
    with tempfile.TemporaryDirectory() as scratch:
        options = find_options(args, workloads, on_gpu, Path(scratch))
        is_first = os.environ.get("RANK", "0") == "0"  # torchrun's other ranks never return from LLM()
        ceilings = measure_ceilings(device) if on_gpu and is_first else None
        start = time.perf_counter()
        llm = LLM(**options)
        startup = time.perf_counter() - start
        report = describe(llm, args) | {"startup_seconds": startup, "workloads": {}}
        for name, workload in workloads.items():
            result, turns[name] = run_workload(llm, workload, num_passes, ceilings, is_traced=bool(figure))
            report["workloads"][name] = result
            print_workload(name, result)
        print(f"\nstart-up: {startup:.1f} s on {report['hardware']}")
        if ceilings:
            free, total = torch.cuda.mem_get_info(device)
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            report |= {"ceilings": ceilings._asdict(), "peak_memory_gib": peak, "device_used_share": 1 - free / total}
            print(f"memory: {peak:.1f} GiB allocated at most, {1 - free / total:.0%} of the card in use")
            print(f"ceilings: {ceilings}")
        llm.close()
        for name, workload in workloads.items() if args.baseline else ():
            seconds = run_transformers(llm, workload, num_passes - 1)
            ratio = seconds / report["workloads"][name]["best"]["seconds"]
            report["workloads"][name]["transformers"] = {"seconds": seconds, "ratio": ratio}
            print(f"{name}: transformers takes {seconds:.3f} s, {ratio:.2f} times as long as the best")
    print(json.dumps(report, default=str))
    if figure:
        plot(turns, figure, args.plot)


if __name__ == "__main__":
    main()
