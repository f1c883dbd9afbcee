"""The benchmark's command line, and what it asks for on this machine."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from tools.shapes import SHAPES
from tools.workloads import CPU_WORKLOAD, OPTIONS_FOR_ALL, WORKLOADS, Workload

DEMO_MODEL = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
LLM_OPTIONS = {  # what each is read as
    "--dtype": str,
    "--max-num-seqs": int,
    "--max-model-len": int,
    "--gpu-memory-utilization": float,
    "--tensor-parallel-size": int,
    "--kvcache-block-size": int,
    "--attention-backend": str,
}


def parse_args(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The arguments; of those that are fields of `Workload` or `Config`, the ones that were given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="one LLM serves all of them")
    parser.add_argument("--passes", type=int, help="of each workload: 3, or 2 of a custom one")
    parser.add_argument("--plot", metavar="FILE", help="draw each workload's last pass over time")
    parser.add_argument("--baseline", choices=["hf"], help="run each workload through transformers as well")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or Hub id; without a GPU, the demo model")
    model.add_argument("--shape", choices=SHAPES, help="random weights; with a GPU, qwen3-0.6b")
    sampling: dict[str, Any] = {"type": json.loads, "default": {}, "metavar": "JSON"}
    parser.add_argument("--sampling", dest="sampling_params", help='e.g. \'{"top_p": 0.9, "top_k": 50}\'', **sampling)
    absent = argparse.SUPPRESS
    custom = parser.add_argument_group("a custom workload, otherwise as this machine's default")
    custom.add_argument("--num-seqs", type=int, default=absent)
    custom.add_argument("--input-len", type=int, nargs=2, metavar=("LO", "HI"), default=absent)
    custom.add_argument("--output-len", type=int, nargs=2, metavar=("LO", "HI"), default=absent)
    custom.add_argument("--temperature", type=float, default=absent)
    options = parser.add_argument_group("options of LLM, otherwise as the workloads need them")
    options.add_argument("--device", default="auto")
    for name, kind in LLM_OPTIONS.items():
        options.add_argument(name, type=kind, default=absent)
    options.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args(argv)
    if args.passes is not None and args.passes < 1:
        parser.error(f"--passes must be at least 1, got {args.passes}")
    if args.baseline and args.sampling_params:
        parser.error("--baseline does the same work only without --sampling")
    if args.workload and given(args, Workload):
        parser.error("a named workload has its own size, lengths and temperature")
    return args


def given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The arguments that are fields of this dataclass."""
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in vars(args).items() if name in names}


def find_device(args: argparse.Namespace) -> torch.device:
    """The device that was asked for, or a GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(default if args.device == "auto" else args.device)


def find_workloads(args: argparse.Namespace, on_gpu: bool) -> dict[str, Workload]:
    """The workloads that were asked for, or this machine's default."""
    changes = given(args, Workload)
    if args.workload or (on_gpu and not changes):
        found = {name: WORKLOADS[name] for name in args.workload or ["classic"]}
    else:
        found = {"custom": replace(WORKLOADS["classic"] if on_gpu else CPU_WORKLOAD, **changes)}
    return {name: replace(workload, sampling=args.sampling_params) for name, workload in found.items()}


def find_model(args: argparse.Namespace, on_gpu: bool, scratch: Path) -> tuple[str, str]:
    """(model, load_format): what was asked for, or this machine's default. A shape is written to `scratch`."""
    if args.model:
        return args.model, "auto"
    if args.shape or on_gpu:
        folder = scratch / (args.shape or "qwen3-0.6b")
        SHAPES[folder.name].save(folder)
        return str(folder), "dummy"
    if not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there; `make demo` fetches it (or name one with --model)")
    return str(DEMO_MODEL), "auto"


def find_options(
    args: argparse.Namespace, workloads: dict[str, Workload], on_gpu: bool, scratch: Path
) -> dict[str, Any]:
    """The options of LLM: what the workloads need, and what was asked for."""
    needed = OPTIONS_FOR_ALL if workloads.keys() - {"classic", "custom"} else {}
    model, load_format = find_model(args, on_gpu, scratch)
    return needed | given(args, Config) | {"model": model, "load_format": load_format}
