"""New weights for an LLM that is there, as those who train it need them. Its shapes, CUDA graphs and KV pool stay."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.linear import Linear
from nanovllm.models.loader import (
    Tensors,
    load_weights,
    match_tensors,
    parameter_targets,
    read_headers,
    redundant_names,
)

Weights = str | PathLike[str] | Iterable[tuple[str, Tensor]]


def replace_weights(engine: LLMEngine, source: Weights) -> None:
    """Fill the model, or a part of it, from a folder's safetensors or from tensors by their names in a checkpoint. After an error in
    the middle the engine takes no request until all weights have been in one call.

    Raises:
        TypeError, ValueError: a source, a name or a shape that does not fit.
        RuntimeError: requests run, or the engine is closed.
    """
    if engine.runner is None:
        raise RuntimeError(engine.why_closed)
    if engine.scheduler.has_unfinished:
        raise RuntimeError("load_weights() must wait until no request runs or waits")
    runner = engine.runner
    on_all_ranks: AbstractContextManager[None] = nullcontext()
    tensors: Tensors = {}
    runner.synchronize()
    if isinstance(source, str | PathLike):
        folder = Path(source).absolute()
        tensors = read_headers(folder)
        fill = partial(fill_from_files, runner, tensors)
        if engine.workers is not None:
            on_all_ranks = engine.workers.all_ranks(pickle.dumps(folder), is_step=False)
    elif not isinstance(source, Iterable):
        raise TypeError(f"source must be a folder or an iterable of (name, tensor), got {source!r}")
    elif engine.workers is not None:
        raise ValueError(f"source must be a folder, which each rank reads, with several ranks, got {source!r:.200}")
    else:
        fill = partial(fill_from_tensors, runner, source)
    with plain_weights(runner):
        match_tensors(runner.model, tensors, is_whole=False)  # before anything is replaced, on any rank
        before = engine.why_refused
        engine.why_refused = "its weights are incomplete: load_weights() must load all of them"
        engine.scheduler.block_manager.forget_all()
        with on_all_ranks:
            is_whole = fill()
    engine.why_refused = "" if is_whole else before


def fill_from_folder(runner: ModelRunner, folder: Path) -> None:
    """What the ranks above 0 do."""
    with plain_weights(runner):
        fill_from_files(runner, read_headers(folder))


def fill_from_files(runner: ModelRunner, tensors: Tensors) -> bool:
    """Fill this rank's model; whether that was all of it."""
    num_filled = load_weights(runner.model, tensors, show_progress=False, is_whole=False)
    return num_filled == len(parameter_targets(runner.model))


def fill_from_tensors(runner: ModelRunner, tensors: Iterable[tuple[str, Tensor]]) -> bool:
    """Fill the model with each tensor as it comes; whether they were all of it."""
    with torch.no_grad():
        targets = parameter_targets(runner.model)
        unfilled, redundant = set(targets), redundant_names(runner.model)
        for full_name, tensor in tensors:
            name = full_name.removeprefix("model.")
            if name in redundant:
                continue
            if name not in targets:
                raise ValueError(f"source has {full_name}, which the model does not have")
            target = targets[name]
            if list(tensor.shape) != target.shape or not tensor.is_floating_point() or tensor.itemsize == 1:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{full_name} of source is {found}, expected a float {target.shape}")
            target.fill(tensor)
            unfilled.discard(name)
        return not unfilled


@contextmanager
def plain_weights(runner: ModelRunner) -> Iterator[None]:
    """Meanwhile, weights that are packed for the CPU's products are as they were before."""
    model = runner.model
    packed = [module for module in model.modules() if isinstance(module, Linear) and module.weight.is_mkldnn]
    for module in packed:
        module.weight = nn.Parameter(module.weight.to_dense(), requires_grad=False)
    if packed and runner.model_config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # packing made it another tensor
    try:
        yield
    finally:
        for module in packed:
            module.reorder_for_cpu()
