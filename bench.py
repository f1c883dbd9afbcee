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

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import transformers

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config, ModelConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Step

DEMO_MODEL = Path(__file__).parent / "models" / "SmolLM2-135M-Instruct"
VOCABULARY = 10000  # the highest token id in the prompts


@dataclass(frozen=True)
class Workload:
    """Requests of uniformly random lengths. With seeds of their own, workloads share no prompts in the prefix cache."""

    num_seqs: int
    input_len: tuple[int, int]  # least and most, beside the shared prefix
    output_len: tuple[int, int]
    shared_prefix: int = 0  # so many tokens begin every prompt of a pass
    temperature: float = 0.6
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # what else is asked of every request

    def requests(self, pass_number: int) -> tuple[list[list[int]], list[int]]:
        """(prompts, output lengths) of a pass, counted from 0."""
        random = Random(self.seed)
        shared = random_tokens(random, self.shared_prefix)
        own = [random_tokens(random, random.randint(*self.input_len)) for _ in range(self.num_seqs)]
        output_lens = [random.randint(*self.output_len) for _ in range(self.num_seqs)]
        if pass_number > 0:
            random = Random(f"seed {self.seed}, pass {pass_number}")
            shared = random_tokens(random, len(shared))
            own = [random_tokens(random, len(tokens)) for tokens in own]
        return [shared + tokens for tokens in own], output_lens


def random_tokens(random: Random, count: int) -> list[int]:
    return [random.randint(0, VOCABULARY) for _ in range(count)]


WORKLOADS = {
    "classic": Workload(256, (100, 1024), (100, 1024), seed=0),
    "single": Workload(1, (100, 100), (512, 512), seed=1),
    "eight": Workload(8, (256, 512), (512, 512), seed=2),
    "many": Workload(1024, (64, 512), (64, 256), seed=3),
    "prefill": Workload(64, (4096, 4096), (1, 1), seed=4),
    "long": Workload(16, (24_000, 32_000), (128, 128), seed=5),
    "prefix": Workload(256, (64, 64), (128, 128), shared_prefix=2048, seed=6),
}
OPTIONS_FOR_ALL = {"max_model_len": 36_000, "max_num_seqs": 1024, "gpu_memory_utilization": 0.85}
CPU_WORKLOAD = Workload(16, (16, 256), (16, 256), temperature=0.0)


class Shape(NamedTuple):
    """The published sizes of a model whose heads have 128 dimensions."""

    config_class: Any
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    vocab_size: int = 151936
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6

    def save(self, folder: Path) -> None:
        """Write the config.json from which dummy weights are made."""
        sizes = self._asdict()
        del sizes["config_class"]
        self.config_class(**sizes, head_dim=128, dtype="bfloat16").save_pretrained(folder)


QWEN2, QWEN3, LLAMA = transformers.Qwen2Config, transformers.Qwen3Config, transformers.LlamaConfig
SHAPES = {
    "qwen3-0.6b": Shape(QWEN3, 28, 1024, 16, 8, 3072, True),
    "qwen3-1.7b": Shape(QWEN3, 28, 2048, 16, 8, 6144, True),
    "qwen3-4b": Shape(QWEN3, 36, 2560, 32, 8, 9728, True),
    "qwen3-8b": Shape(QWEN3, 36, 4096, 32, 8, 12288, False),
    "qwen3-14b": Shape(QWEN3, 40, 5120, 40, 8, 17408, False),
    "qwen3-32b": Shape(QWEN3, 64, 5120, 64, 8, 25600, False),
    "qwen2.5-7b": Shape(QWEN2, 28, 3584, 28, 4, 18944, False, 152064, 32768),
    "llama-3.1-8b": Shape(LLAMA, 32, 4096, 32, 8, 14336, False, 128256, 131072, 5e5),
}


class LeastWork(NamedTuple):
    """What no exact engine avoids for some requests."""

    kv_bytes: int
    weight_bytes: int
    prompt_flops: int


def least_work(model: ModelConfig, prompt_lens: list[int], output_lens: list[int], shared_prefix: int = 0) -> LeastWork:
    """KV and weights that have to be read, and the arithmetic of the prompts.

    Computing a prompt gives the first output token; each further one reads its context's KV once. There are as many
    steps as the longest output has tokens, and each reads the weights. A shared prefix is computed once, and in a step
    it is read once for all. What decoding computes is left out.
    """
    num_steps = max(output_lens)
    prompt_tokens = shared_prefix
    attended_pairs = shared_prefix**2 // 2  # causal: half of all
    kv_tokens = shared_prefix * (num_steps - 1)
    for length, num_outputs in zip(prompt_lens, output_lens, strict=True):
        prompt_tokens += length - shared_prefix
        attended_pairs += (length**2 - shared_prefix**2) // 2
        kv_tokens += sum(length - shared_prefix + i for i in range(1, num_outputs))

    m = model
    projections = 2 * m.hidden_size * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim  # q and o, k and v
    layers = m.num_hidden_layers * (projections + 3 * m.hidden_size * m.intermediate_size)
    kv_of_token = m.num_hidden_layers * 2 * m.num_key_value_heads * m.head_dim
    attention_flops = 2 * 2 * m.num_hidden_layers * m.num_attention_heads * m.head_dim * attended_pairs
    return LeastWork(
        kv_bytes=kv_tokens * kv_of_token * m.dtype.itemsize,
        weight_bytes=num_steps * (layers + m.vocab_size * m.hidden_size) * m.dtype.itemsize,
        prompt_flops=2 * layers * prompt_tokens + attention_flops,
    )


class Ceilings(NamedTuple):
    """What this card reaches in a plain copy and in a plain product."""

    bytes_per_s: float
    flop_per_s: float

    def limit_seconds(self, work: LeastWork) -> float:
        """All reads, and after them all arithmetic: engines that overlap the two gain a little on this limit."""
        return (work.kv_bytes + work.weight_bytes) / self.bytes_per_s + work.prompt_flops / self.flop_per_s


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 2 GB, each byte read and written, and a bfloat16 product of random 8192 × 8192 matrices."""
    source = torch.ones(2 * 10**9, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    timer = DeviceTimer(device)
    medians = []
    for launch, args in ((target.copy_, (source,)), (torch.mm, (a, b))):
        for _ in range(50):
            timer.call(launch, *args)
        medians.append(statistics.median(timer.take()))
    torch.cuda.reset_peak_memory_stats(device)
    return Ceilings(2 * source.nbytes / medians[0], 2 * 8192**3 / medians[1])


class DeviceTimer:
    """How long the device takes for what each call launches, without waiting for it before `take`.

    That runs from when the device gets to the call until the call's last kernel ends; where the device waits for the CPU in
    between, that counts as well.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # used again after each `take`
        self.num_calls = 0

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.num_calls == len(self.events):
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        start, end = self.events[self.num_calls]
        self.num_calls += 1
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        result = function(*args)
        end.record(stream)
        return result

    def take(self) -> list[float]:
        """Seconds of each call since the last `take`."""
        torch.cuda.synchronize(self.device)
        calls = self.events[: self.num_calls]
        self.num_calls = 0
        return [start.elapsed_time(end) / 1000 for start, end in calls]


@contextmanager
def wrapped(owner: Any, method: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile, calls of the method are `wrapper(method, *args)`. Left there, it would keep a closed LLM's memory."""
    original = getattr(owner, method)
    setattr(owner, method, lambda *args: wrapper(original, *args))
    try:
        yield
    finally:
        delattr(owner, method)


class Turn(NamedTuple):
    """One turn of the loop, and the step whose tokens came in."""

    start: float
    end: float
    step: Step
    kv_usage: float


class Trace:
    """What the turns of an engine's loop did, and when."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.turns: list[Turn] = []

    def call(self, run: Callable[[], Step]) -> Step:
        start = time.perf_counter()
        step = run()
        end = time.perf_counter()
        self.turns.append(Turn(start, end, step, self.engine.stats()["kv_cache_usage"]))
        return step


def run_pass(llm: LLM, workload: Workload, pass_number: int, timer: DeviceTimer | None, trace: Trace | None) -> float:
    """Seconds; RuntimeError if an output is not as long as it was asked for."""
    prompts, output_lens = workload.requests(pass_number)
    sampling = {"temperature": workload.temperature, "ignore_eos": True} | workload.sampling
    params = [SamplingParams(max_tokens=n, **sampling) for n in output_lens]
    with ExitStack() as watchers:
        if timer:
            watchers.enter_context(wrapped(llm.engine.runner, "forward", timer.call))
            watchers.enter_context(wrapped(llm.engine.runner, "sample", timer.call))
        if trace:
            watchers.enter_context(wrapped(llm.engine, "step", trace.call))
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
    for i, (output, wanted) in enumerate(zip(outputs, output_lens, strict=True)):
        if (got := len(output["token_ids"])) != wanted:
            raise RuntimeError(f"request {i} was asked for {wanted} tokens and gave {got}")
    return seconds


def run_workload(
    llm: LLM, workload: Workload, num_passes: int, ceilings: Ceilings | None, is_traced: bool
) -> tuple[dict[str, Any], list[Turn]]:
    """What the JSON says of a workload, and the turns of its last pass.

    Of "passes", each list has a figure for each pass. Without ceilings, it has no shares.
    """
    prompts, output_lens = workload.requests(0)
    prompt_lens = [len(prompt) for prompt in prompts]
    timer = DeviceTimer(llm.config.torch_device) if ceilings else None
    seconds, busy_seconds = [], []
    for number in range(num_passes):
        trace = Trace(llm.engine) if is_traced else None
        seconds.append(run_pass(llm, workload, number, timer, trace))
        busy_seconds.append(sum(timer.take()) if timer else 0.0)
    passes = {
        "seconds": seconds,
        "output_tok_per_s": [sum(output_lens) / s for s in seconds],
        "prompt_tok_per_s": [sum(prompt_lens) / s for s in seconds],
    }
    report: dict[str, Any] = asdict(workload)
    report |= {"prompt_tokens": sum(prompt_lens), "output_tokens": sum(output_lens), "passes": passes}
    if ceilings:
        work = least_work(llm.engine.model_config, prompt_lens, output_lens, workload.shared_prefix)
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


def new_figure(num_columns: int) -> Any:
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    return figure.Figure(figsize=(1 + 5 * num_columns, 8), layout="constrained")


def plot(traces: dict[str, list[Turn]], figure: Any, file: str) -> None:
    """A column for each workload; over time: how long steps took, their tokens, and the use of the KV pool."""
    axes = figure.subplots(3, len(traces), sharex="col", squeeze=False)
    for (name, turns), (top, middle, bottom) in zip(traces.items(), axes.T, strict=True):
        ends = [turn.end - turns[0].start for turn in turns]
        top.scatter(ends, [1000 * (turn.end - turn.start) for turn in turns], s=3, color="black")
        for kind, count in ("prompt", "num_prefill_tokens"), ("output", "num_decode_tokens"):
            counts = [getattr(turn.step, count) or None for turn in turns]  # nothing is drawn for None
            middle.plot(ends, counts, linestyle="none", marker=".", markersize=3, label=kind)
        middle.legend()
        bottom.plot(ends, [100 * turn.kv_usage for turn in turns], color="black")
        top.set(title=name, ylabel="step, ms", yscale="log")
        middle.set(ylabel="tokens in a step", yscale="log")
        bottom.set(ylabel="KV pool in use, %", ylim=(0, None), xlabel="seconds", xlim=(0, None))
    figure.savefig(file, dpi=150)


def run_transformers(llm: LLM, model: str, workload: Workload, pass_number: int) -> float:
    """Seconds for one batch, padded on the left, that goes on until the longest output is there."""
    device, dtype = llm.config.torch_device, llm.engine.model_config.dtype
    if llm.config.load_format == "dummy":
        config = transformers.AutoConfig.from_pretrained(model)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    hf.to(device)
    prompts, output_lens = workload.requests(pass_number)
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if workload.temperature > 0:
        sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0}

    def generate(num_tokens: int) -> float:
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        start = time.perf_counter()
        hf.generate(input_ids=input_ids, attention_mask=mask, pad_token_id=0, **lengths, **sampling)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    generate(4)  # warms up
    return generate(max(output_lens))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="one LLM serves all of them")
    parser.add_argument("--passes", type=int, help="of each workload: 3, or 2 of a custom one")
    parser.add_argument("--plot", metavar="FILE", help="draw each workload's last pass over time")
    parser.add_argument("--baseline", choices=["hf"], help="run each workload through transformers as well")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or Hub id; without a GPU, the demo model")
    model.add_argument("--shape", choices=SHAPES, help="random weights; with a GPU, qwen3-0.6b")
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--sampling",
        dest="sampling_params",
        type=json.loads,
        default={},
        metavar="JSON",
        help='e.g. \'{"top_p": 0.9, "top_k": 50}\'',
    )
    custom = parser.add_argument_group("a custom workload, otherwise as this machine's default")
    custom.add_argument("--num-seqs", type=int, default=absent)
    custom.add_argument("--input-len", type=int, nargs=2, metavar=("LO", "HI"), default=absent)
    custom.add_argument("--output-len", type=int, nargs=2, metavar=("LO", "HI"), default=absent)
    custom.add_argument("--temperature", type=float, default=absent)
    options = parser.add_argument_group("options of LLM, otherwise as the workloads need them")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default=absent)
    options.add_argument("--max-num-seqs", type=int, default=absent)
    options.add_argument("--max-model-len", type=int, default=absent)
    options.add_argument("--gpu-memory-utilization", type=float, default=absent)
    options.add_argument("--tensor-parallel-size", type=int, default=absent)
    options.add_argument("--kvcache-block-size", type=int, default=absent)
    options.add_argument("--attention-backend", default=absent)
    options.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args(argv)
    if args.passes is not None and args.passes < 1:
        parser.error(f"--passes must be at least 1, got {args.passes}")
    if args.workload and given(args, Workload):
        parser.error("a named workload has its own size, lengths and temperature")
    return args


def given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The arguments that are fields of this dataclass."""
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in vars(args).items() if name in names}


def find_workloads(args: argparse.Namespace, on_gpu: bool) -> dict[str, Workload]:
    """What was asked for, or this machine's default."""
    changes = given(args, Workload)
    if args.workload or (on_gpu and not changes):
        found = {name: WORKLOADS[name] for name in args.workload or ["classic"]}
    else:
        found = {"custom": replace(WORKLOADS["classic"] if on_gpu else CPU_WORKLOAD, **changes)}
    return {name: replace(workload, sampling=args.sampling_params) for name, workload in found.items()}


def find_model(args: argparse.Namespace, on_gpu: bool, scratch: Path) -> tuple[str, str]:
    """(model, load_format): what was asked for, or this machine's default."""
    if args.model:
        return args.model, "auto"
    if args.shape or on_gpu:
        folder = scratch / (args.shape or "qwen3-0.6b")
        SHAPES[folder.name].save(folder)
        return str(folder), "dummy"
    if not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there; `make demo` fetches it (or name one with --model)")
    return str(DEMO_MODEL), "auto"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(default_device if args.device == "auto" else args.device)
    on_gpu = device.type == "cuda"
    workloads = find_workloads(args, on_gpu)
    num_passes = args.passes or (2 if "custom" in workloads else 3)
    needed = OPTIONS_FOR_ALL if workloads.keys() - {"classic", "custom"} else {}
    figure = new_figure(len(workloads)) if args.plot else None
    traces = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, load_format = find_model(args, on_gpu, Path(scratch))
        # Of torchrun's ranks the others never return from LLM().
        is_first = os.environ.get("RANK", "0") == "0"
        ceilings = measure_ceilings(device) if on_gpu and is_first else None
        options: dict[str, Any] = needed | given(args, Config) | {"model": model, "load_format": load_format}
        start = time.perf_counter()
        llm = LLM(**options)
        startup = time.perf_counter() - start
        model_config = llm.engine.model_config
        cpu = f"CPU, {torch.get_num_threads()} threads"
        report: dict[str, Any] = {
            "settings": asdict(llm.config)
            | {
                "model": args.model or Path(model).name,
                "dtype": str(model_config.dtype).removeprefix("torch."),
                "max_model_len": llm.engine.max_model_len,
                "num_kvcache_blocks": llm.stats()["num_kvcache_blocks"],
            },
            "hardware": torch.cuda.get_device_name(device) if on_gpu else cpu,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "startup_seconds": startup,
            "workloads": {},
        }
        for name, workload in workloads.items():
            result, traces[name] = run_workload(llm, workload, num_passes, ceilings, is_traced=bool(figure))
            report["workloads"][name] = result
            print_workload(name, result)
        print(f"\nstart-up: {startup:.1f} s on {report['hardware']}")
        if ceilings:
            free, total = torch.cuda.mem_get_info(device)
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            report |= {"ceilings": ceilings._asdict(), "peak_memory_gib": peak, "device_used_share": 1 - free / total}
            print(f"memory: {peak:.1f} GiB allocated at most, {1 - free / total:.0%} of the card in use")
            copied, multiplied = ceilings.bytes_per_s / 1e12, ceilings.flop_per_s / 1e12
            print(f"ceilings: {copied:.2f} TB/s in a copy, {multiplied:.0f} TFLOP/s in a product")
        llm.close()
        if args.baseline:
            for name, workload in workloads.items():
                seconds = run_transformers(llm, model, workload, num_passes - 1)
                result = report["workloads"][name]
                ratio = seconds / result["best"]["seconds"]
                result["transformers"] = {"seconds": seconds, "ratio": ratio}
                print(f"{name}: transformers takes {seconds:.3f} s, {ratio:.2f} times as long as the best")
    print(json.dumps(report, default=str))
    if figure:
        plot(traces, figure, args.plot)


if __name__ == "__main__":
    main()
