"""Throughput of offline generation: random prompts of random lengths, every output as long as it was asked for.

    python bench.py                     # GPU: 256 requests in Qwen3-0.6B's shape; CPU: 16 requests to the demo model
    python bench.py --baseline hf       # the same requests through transformers' generate() as well
    python bench.py --num-seqs 1 --input-len 32 32 --output-len 128 128

It prints a line for people and, last, one line of JSON.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from random import Random

import torch
import transformers

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parent / "models" / "SmolLM2-135M-Instruct"
VOCABULARY = 10000  # the highest token id in the prompts


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id; without it, see above")
    parser.add_argument("--num-seqs", type=int, default=256 if on_gpu else 16)
    parser.add_argument(
        "--input-len", type=int, nargs=2, default=(100, 1024) if on_gpu else (16, 256), metavar=("LO", "HI")
    )
    parser.add_argument(
        "--output-len", type=int, nargs=2, default=(100, 1024) if on_gpu else (16, 256), metavar=("LO", "HI")
    )
    parser.add_argument("--temperature", type=float, default=0.6 if on_gpu else 0.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--baseline", choices=["hf"], help="also run transformers, and print the ratio")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    random = Random(0)
    prompts = [
        [random.randint(0, VOCABULARY) for _ in range(random.randint(*args.input_len))]
        for _ in range(args.num_seqs)
    ]
    output_lens = [random.randint(*args.output_len) for _ in range(args.num_seqs)]
    with tempfile.TemporaryDirectory() as scratch:
        model, load_format = find_model(args, Path(scratch))
        start = time.perf_counter()
        llm = LLM(
            model,
            device=args.device,
            dtype=args.dtype,
            load_format=load_format,
            max_num_seqs=args.max_num_seqs,
            enforce_eager=args.enforce_eager,
        )
        startup = time.perf_counter() - start
        device, dtype = llm.config.torch_device, llm.engine.model_config.dtype
        seconds = run_nanovllm(llm, prompts, output_lens, args.temperature)
        llm.close()
        total = sum(output_lens)
        report = {
            "output_tok_per_s": round(total / seconds, 2),
            "output_tokens": total,
            "prompt_tokens": sum(map(len, prompts)),
            "seconds": round(seconds, 3),
            "startup_seconds": round(startup, 2),
            "settings": vars(args)
            | {"model": str(model) if args.model else Path(model).name, "load_format": load_format},
            "dtype": str(dtype).removeprefix("torch."),
            "hardware": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        print(f"Total: {total}tok, Time: {seconds:.2f}s, Throughput: {total / seconds:.2f}tok/s")
        if args.baseline == "hf":
            baseline = run_transformers(
                str(model), load_format, device, dtype, prompts, output_lens, args.temperature
            )
            report |= {
                "baseline_tok_per_s": round(total / baseline, 2),
                "ratio": round(baseline / seconds, 3),
            }
            print(
                f"transformers: Time: {baseline:.2f}s, Throughput: {total / baseline:.2f}tok/s; nanovllm is {baseline / seconds:.2f} times as fast"
            )
    print(json.dumps(report))


def find_model(args: argparse.Namespace, scratch: Path) -> tuple[str | Path, str]:
    """(model, load_format) to run: the one asked for, or this machine's default."""
    if args.model:
        return args.model, "auto"
    if torch.cuda.is_available() and args.device != "cpu":
        folder = scratch / "qwen3-0.6b"
        qwen3_06b().save_pretrained(folder)
        return folder, "dummy"
    if not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there; `make demo` fetches it (or name one with --model)")
    return DEMO_MODEL, "auto"


def qwen3_06b() -> transformers.Qwen3Config:
    return transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def run_nanovllm(llm: LLM, prompts: list[list[int]], output_lens: list[int], temperature: float) -> float:
    """Seconds for all requests, after a warm-up with other prompts of the same lengths."""
    warm_up = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=4)
    llm.generate([prompt[::-1] for prompt in prompts], warm_up, use_tqdm=False)
    params = [SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n) for n in output_lens]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert [len(output["token_ids"]) for output in outputs] == output_lens
    return seconds


def run_transformers(
    model: str,
    load_format: str,
    device: torch.device,
    dtype: torch.dtype,
    prompts: list[list[int]],
    output_lens: list[int],
    temperature: float,
) -> float:
    """Seconds for one batch, padded on the left, that goes on until the longest output is there."""
    if load_format == "dummy":
        config = transformers.AutoConfig.from_pretrained(model)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    hf.to(device)
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling = {"do_sample": temperature > 0} | (
        {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    )

    def generate(num_tokens: int) -> float:
        start = time.perf_counter()
        hf.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            **sampling,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    generate(4)
    return generate(max(output_lens))


if __name__ == "__main__":
    main()
