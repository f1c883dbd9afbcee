"""ModelRunner: owns the device: weights, KV cache, the rows' tables. It launches steps and never waits for them.

Nothing between planning a step and launching it synchronises; the only wait is `SampledTokens.result`.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from nanovllm import attention
from nanovllm.config import Config, ModelConfig
from nanovllm.engine.batch import Batch, DeviceTables, SamplingBatch, upload
from nanovllm.engine.memory import GIB, available_host_memory, cuda_pool_bytes
from nanovllm.engine.scheduler import ScheduledSequence, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.linear import Linear
from nanovllm.layers.sampler import logprobs, sample
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import load_dummy, load_weights
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass
class SampledTokens:
    """The tokens of a launched step, on their way to the CPU."""

    sequences: list[Sequence]
    token_ids: Tensor  # [S] int64
    logprobs: tuple[
        Tensor, ...
    ]  # for the sequences that ask for them: see layers.sampler.logprobs; else empty
    copied: torch.cuda.Event | None  # reached when both are on the CPU

    def result(self) -> Iterator[tuple[Sequence, int, dict[int, Logprob] | None]]:
        """Wait for the tokens; for each sequence its token and, if it asks, the token's and others' log-probabilities."""
        if self.copied is not None:
            self.copied.synchronize()
        rows = zip(*(column.tolist() for column in self.logprobs), strict=True)
        for seq, token_id in zip(self.sequences, self.token_ids.tolist(), strict=True):
            candidates = None
            if (num_top := seq.params.logprobs) is not None:
                drawn, rank, values, ids = next(rows)
                num_top = len(ids) if num_top == -1 else num_top
                candidates = {token_id: Logprob(drawn, rank)}
                candidates |= {ids[i]: Logprob(values[i], i + 1) for i in range(num_top)}
            yield seq, token_id, candidates


class ModelRunner:
    """Runs steps of one model on one device. `num_blocks` is the size of the KV pool that it made."""

    def __init__(self, config: Config, model_config: ModelConfig, folder: Path, max_len: int):
        self.device = config.torch_device
        self.block_size = config.kvcache_block_size
        self.model_config = model_config
        self.vocab_size = model_config.vocab_size
        self.backend = attention.select(config.attention_backend)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self._start_free, _ = torch.cuda.mem_get_info(self.device)
            self._start_reserved = torch.cuda.memory_reserved(self.device)
        with torch.device(self.device):
            self.model = Decoder(model_config, self.backend, max_len)
            num_rows = config.max_num_seqs + 1
            self.tables = DeviceTables(
                block_tables=torch.zeros(num_rows, -(-max_len // self.block_size), dtype=torch.int32),
                last_token=torch.zeros(num_rows, dtype=torch.int32),
            )
        if config.load_format == "dummy":
            load_dummy(self.model)
        else:
            load_weights(self.model, folder, config.use_tqdm)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, Linear):
                    module.pack()
        self.kv_cache = self._new_kv_cache(1)  # until it is known how many fit
        self.num_blocks = self._choose_num_blocks(config, max_len)
        self.kv_cache = self._new_kv_cache(self.num_blocks)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Launch a step up to its logits [S, vocabulary], of its sampled sequences in order; return at once."""
        batch = Batch.from_step(step, self.tables, self.block_size)
        batch.attention = self.backend.prepare(batch)
        hidden = self.model(batch, self.kv_cache)
        return self.model.logits(hidden[batch.logits_indices])

    @torch.inference_mode()
    def sample(self, step: Step, logits: Tensor) -> SampledTokens:
        """Launch the sampling of a step whose predecessor is committed, so that every sequence is known in full.

        A sequence that the predecessor finished is left out.
        """
        sampled = [s.seq for s in step.scheduled if s.is_sampled]
        alive = [i for i, seq in enumerate(sampled) if not seq.is_finished]
        sequences = [sampled[i] for i in alive]
        if not sequences:
            return SampledTokens([], torch.empty(0, dtype=torch.int64), (), None)
        batch = SamplingBatch.from_sequences(sequences, alive, self.vocab_size, self.device)
        if len(alive) < len(sampled):
            logits = logits[batch.logits_rows]
        token_ids = sample(logits, batch)
        self.tables.last_token[batch.rows] = token_ids.int()
        asked = self._logprobs(sequences, logits, token_ids)
        token_ids = token_ids.to("cpu", non_blocking=True)
        asked = tuple(tensor.to("cpu", non_blocking=True) for tensor in asked)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        return SampledTokens(sequences, token_ids, asked, copied)

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _logprobs(self, sequences: list[Sequence], logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        """Of the sequences that ask for them, as many as any of them asks for."""
        asking = [(i, s.params.logprobs) for i, s in enumerate(sequences) if s.params.logprobs is not None]
        if not asking:
            return ()
        num_top = max(self.vocab_size if n == -1 else n for _, n in asking)
        rows = upload(torch.tensor([i for i, _ in asking]), self.device)
        return logprobs(logits[rows], token_ids[rows], num_top)

    def _new_kv_cache(self, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values [blocks, block_size, H_kv, D] in one piece of memory.

        It starts as zeros: a masked value still takes part in attention, and a NaN would spread. On the CPU they come from
        numpy, whose zeros take no memory until they are written, where PyTorch's take it all at once.
        """
        c = self.model_config
        shape = (c.num_layers, 2, num_blocks, self.block_size, c.num_kv_heads, c.head_dim)
        if self.device.type == "cpu":
            num_bytes = math.prod(shape) * c.dtype.itemsize
            cache = torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(c.dtype).view(shape)
        else:
            cache = torch.zeros(shape, dtype=c.dtype, device=self.device)
        return [(k, v) for k, v in cache]

    def _choose_num_blocks(self, config: Config, max_len: int) -> int:
        """The number of blocks that the options and the memory allow; ValueError if they hold too little."""
        block_bytes = sum(k.nbytes + v.nbytes for k, v in self.kv_cache)
        needed = -(-max_len // self.block_size) + 1  # and the trash block
        if self.device.type == "cuda":
            num_blocks = self._cuda_pool_bytes(config, max_len, block_bytes) // block_bytes
        else:
            pool = available_host_memory() // 4
            wanted = -(-config.max_num_seqs * max_len // self.block_size) + 1
            num_blocks = min(wanted, pool // block_bytes)
            if config.num_kvcache_blocks != -1:
                num_blocks = config.num_kvcache_blocks
        if num_blocks < needed:
            raise ValueError(
                f"the KV pool has {num_blocks} blocks of {self.block_size} tokens, but one sequence of "
                f"max_model_len={max_len} tokens takes {needed}; lower max_model_len, or give the pool more "
                f"(num_kvcache_blocks, gpu_memory_utilization)"
            )
        logger.info(
            "weights %.2f GiB; KV pool %.2f GiB: %d blocks of %d tokens",
            sum(p.nbytes for p in self.model.parameters()) / GIB,
            num_blocks * block_bytes / GIB,
            num_blocks,
            self.block_size,
        )
        return num_blocks

    def _cuda_pool_bytes(self, config: Config, max_len: int, block_bytes: int) -> int:
        """What a profiled largest step leaves of our share, or what the options ask for, if that much is free."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        self._run_largest_steps(config, max_len)
        peak = torch.cuda.max_memory_reserved(self.device) - reserved
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        outside_torch = max(0, self._start_free - free - (reserved - self._start_reserved))
        held = reserved + outside_torch
        logger.info("this process holds %.2f GiB, a step takes %.2f GiB", held / GIB, peak / GIB)
        if config.num_kvcache_blocks == -1:
            return cuda_pool_bytes(total, free, config.gpu_memory_utilization, held, peak)
        pool = config.num_kvcache_blocks * block_bytes
        if pool + peak > free:
            raise ValueError(
                f"num_kvcache_blocks={config.num_kvcache_blocks} take {pool / GIB:.2f} GiB, but only "
                f"{max(free - peak, 0) / GIB:.2f} GiB are free beside the {peak / GIB:.2f} GiB that a step takes"
            )
        return pool

    def _run_largest_steps(self, config: Config, max_len: int) -> None:
        """Run the steps that take the most memory, on row 0 and block 0: longest prompts, then most sequences."""
        params = SamplingParams(top_p=0.9, logprobs=0)
        budget = config.max_num_batched_tokens
        prompts = Step()
        while budget and len(prompts.scheduled) < config.max_num_seqs:
            num_tokens = min(budget, max_len)
            seq = Sequence(0, [0] * num_tokens, params, seed=0, max_tokens=1)
            prompts.scheduled.append(ScheduledSequence(seq, 0, num_tokens, is_decode=False, is_sampled=True))
            budget -= num_tokens
        decodes = Step()
        for _ in range(min(config.max_num_seqs, config.max_num_batched_tokens)):
            seq = Sequence(0, [0], params, seed=0, max_tokens=1)
            decodes.scheduled.append(ScheduledSequence(seq, max_len - 1, 1, is_decode=True, is_sampled=True))
        for step in (prompts, decodes):
            self.sample(step, self.forward(step))
        self.synchronize()
