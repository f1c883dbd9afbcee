"""Throughput over the length of a prefix that all requests share: its KV read once in a step, and once for each request.

    python tools/shared_prefix.py measure shared_prefix.json     # needs a GPU
    python tools/shared_prefix.py draw shared_prefix.json docs/shared_prefix.svg     # needs matplotlib

256 requests of 64 more tokens and outputs of 128, the best of the passes after the first; Qwen3-0.6B's shape, random weights.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import run_pass
from nanovllm import LLM
from tools.plot import new_figure
from tools.shapes import SHAPES
from tools.workloads import Workload

LENGTHS = [0, 128, 256, 512, 1024, 2048, 4096]
VLLM = {2048: 17_652}  # tok/s of vLLM 0.26.0 on an H200, of the same requests


def measure(num_passes: int = 3) -> dict[str, list[float]]:
    """tok/s for each length, of `shared` and `not shared` reads, in turns on one LLM."""
    figures: dict[str, list[float]] = {"shared": [], "not shared": []}
    with tempfile.TemporaryDirectory() as folder:
        SHAPES["qwen3-0.6b"].save(Path(folder))
        llm = LLM(folder, load_format="dummy", max_model_len=max(LENGTHS) + 64 + 128, max_num_seqs=256, use_tqdm=False)
    assert llm.engine.runner is not None, "it is not closed"
    backend = llm.engine.runner.backend
    least_tokens = backend.shared_tokens
    for length in LENGTHS:
        for i, (name, speeds) in enumerate(figures.items()):
            backend.shared_tokens = least_tokens if name == "shared" else 0
            workload = Workload(256, (64, 64), (128, 128), shared=((1, length),), seed=length + i)
            seconds = [run_pass(llm, workload, number, None, None) for number in range(num_passes)]
            speeds.append(256 * 128 / min(seconds[1:]))
            print(f"{length:>6} tokens, {name}: {speeds[-1]:,.0f} tok/s", flush=True)
    return figures


def draw(figures: dict[str, list[float]], file: Path) -> None:
    figure = new_figure(1)
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    for name, speeds in figures.items():
        axes.plot(LENGTHS, speeds, marker="o", label=f"nanovllm, {name}")
    axes.plot(list(VLLM), list(VLLM.values()), linestyle="none", marker="s", color="black", label="vLLM 0.26.0")
    axes.set(xlabel="tokens of the prefix that 256 requests share", ylabel="output tok/s", ylim=(0, None))
    axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "draw"])
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    args = parser.parse_args()
    if args.action == "measure":
        args.figures.write_text(json.dumps(measure()) + "\n")
    else:
        draw(json.loads(args.figures.read_text()), args.picture or args.figures.with_suffix(".svg"))


if __name__ == "__main__":
    main()
