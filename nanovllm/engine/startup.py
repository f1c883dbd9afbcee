"""Startup: from a checkpoint to a ModelRunner that is ready: weights loaded, the KV pool as large as memory allows, decode steps
captured as CUDA graphs, and kernels loaded."""

import logging
from array import array
from dataclasses import replace
from functools import partial

import torch

from nanovllm import attention, kernels
from nanovllm.config import Config, ModelConfig
from nanovllm.engine.batch import TOKEN_MULTIPLE
from nanovllm.engine.cuda_graphs import graph_bytes, graph_sizes
from nanovllm.engine.memory import CudaMemory, available_host_memory, check_weights_fit, gib
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import ScheduledChunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.linear import Linear, limit_onednn_caches
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import Tensors, load_dummy, load_weights, match_tensors
from nanovllm.parallel.group import Group
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


def start_runner(config: Config, model_config: ModelConfig, tensors: Tensors, group: Group) -> ModelRunner:
    """A runner of this rank's share of a model, on the group's device; ValueError where memory does not suffice."""
    memory = CudaMemory(group.device) if group.device.type == "cuda" else None
    if memory is None:
        limit_onednn_caches()
    max_len = min(config.max_model_len, model_config.max_len)
    local_config = replace(
        model_config,
        num_attention_heads=group.share(model_config.num_attention_heads).size,
        num_key_value_heads=group.share(model_config.num_key_value_heads).size,
    )
    backend = attention.select(config.attention_backend, local_config, group.device, config.kvcache_block_size)
    new_model = partial(config.model_class or Decoder, model_config, backend, group)
    with torch.device("meta"):  # names, shapes and bytes, before memory is taken
        planned = new_model(1)
    if tensors:
        match_tensors(planned, tensors)
    if memory:
        weights = sum(parameter.nbytes for parameter in planned.parameters())
        check_weights_fit(weights, memory.total, config.gpu_memory_utilization, group.size)
    with torch.device(group.device):
        model = new_model(max(max_len, TOKEN_MULTIPLE))  # padding has positions too
    load(model, config, tensors, group)
    runner = ModelRunner(config, model_config, model, backend, group, max_len)
    least = 1 if model.max_few_rows else 2  # torch.compile would compile every layer again for one row
    sizes = graph_sizes(least, config.max_num_seqs) if model.is_compiled and backend.capturable else []
    runner.allocate_kv_cache(group.least(choose_num_blocks(runner, config, memory, sizes)))
    for size in reversed(sizes):
        runner.graphs.capture(size, runner.upload_trash_decode(size))
    runner.warm_up()
    return runner


def load(model: Decoder, config: Config, tensors: Tensors, group: Group) -> None:
    """Fill the model with its weights, in the layout in which its device is fast, and compile its layers."""
    if config.load_format == "dummy":
        load_dummy(model)
    else:
        load_weights(model, tensors, config.use_tqdm and group.rank == 0)
    if group.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, Linear):
                module.reorder_for_cpu()
    elif kernels.AVAILABLE and not config.enforce_eager:
        model.compile_layers()


def choose_num_blocks(runner: ModelRunner, config: Config, memory: CudaMemory | None, sizes: list[int]) -> int:
    """The number of KV blocks that the options and the memory allow; ValueError if they hold too little."""
    block_size, max_len = runner.block_size, runner.max_len
    block_bytes = sum(cache.k.nbytes + cache.v.nbytes for cache in runner.kv_cache)  # it has one block
    num_blocks = config.num_kvcache_blocks
    if memory:
        peak = memory.peak_of(lambda: run_largest_steps(runner, config))
        peak += graph_bytes(runner.upload_trash_decode, sizes, runner.device) if sizes else 0
        asked = None if num_blocks == -1 else num_blocks * block_bytes
        num_blocks = memory.pool_bytes(config.gpu_memory_utilization, peak, asked) // block_bytes
    elif num_blocks == -1:
        wanted = -(-config.max_num_seqs * max_len // block_size) + 1
        num_blocks = min(wanted, available_host_memory() // 4 // runner.group.size // block_bytes)
    needed = -(-max_len // block_size) + 1  # and the trash block
    if num_blocks < needed:
        raise ValueError(
            f"the KV pool has {num_blocks} blocks of {block_size} tokens, but one sequence of max_model_len={max_len} "
            f"tokens takes {needed}; lower max_model_len, or give the pool more "
            "(num_kvcache_blocks, gpu_memory_utilization)"
        )
    weights, pool = gib(sum(p.nbytes for p in runner.model.parameters())), gib(num_blocks * block_bytes)
    logger.info("weights %s; KV pool %s: %d blocks of %d tokens", weights, pool, num_blocks, block_size)
    return num_blocks


def run_largest_steps(runner: ModelRunner, config: Config) -> None:
    """Run the steps that take the most memory, on row 0 and block 0: longest prompts, then most sequences."""
    max_len, num_tokens = runner.max_len, config.max_num_batched_tokens
    longest = Sequence(0, array("i", [0] * max_len), SamplingParams(), seed=0, max_tokens=1)
    lens = [max_len] * (num_tokens // max_len) + [num_tokens % max_len]
    chunks = [ScheduledChunk(longest, 0, n, is_sampled=True) for n in lens[: config.max_num_seqs] if n]
    rows = [ScheduledChunk(longest, max_len - 1, 1, is_sampled=True)] * min(config.max_num_seqs, num_tokens)
    truncated = SamplingParams(top_p=0.9)
    demands = SamplingParams(), truncated, replace(truncated, logprobs=0, presence_penalty=1.0)
    for step in Step(chunks=chunks), Step(decodes=rows):
        launched = runner.forward(runner.pack(step), step)
        for params in demands if runner.group.rank == 0 else ():  # the others do not sample
            row = ScheduledChunk(Sequence(0, array("i", [0]), params, seed=0, max_tokens=1), 0, 1, is_sampled=True)
            # a copy, as sampling takes the logits away
            runner.sample(replace(launched, step=Step(decodes=[row] * len(launched.rows))))
        del launched  # its logits are not there while the next step runs
        runner.synchronize()
