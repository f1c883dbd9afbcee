"""ModelRunner: owns the device: weights, KV cache, the rows' tables. It launches steps and never waits for them.

Nothing between planning a step and launching it synchronises; the only wait is `SampledTokens.result`.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm import attention, kernels
from nanovllm.config import Config, ModelConfig
from nanovllm.distributed import Group
from nanovllm.engine.adjust import adjust
from nanovllm.engine.batch import INT, KVCache
from nanovllm.engine.cuda_graphs import DecodeGraphs, graph_sizes
from nanovllm.engine.memory import GIB, available_host_memory, check_weights_fit, cuda_pool_bytes
from nanovllm.engine.packing import (
    DeviceTables,
    HostBatch,
    PackedStep,
    Staging,
    int32,
    pack_chunks,
    pack_decodes,
    upload,
)
from nanovllm.engine.scheduler import ScheduledChunk, Step
from nanovllm.engine.sequence import LogprobRow, Sequence
from nanovllm.layers.linear import Linear
from nanovllm.layers.sampler import SamplingBatch, logprobs, pack_sampling, sample
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import load_dummy, load_weights, resolve_model
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Chunks are padded to a multiple of so many tokens where layers are compiled, which makes a variant for one token.
TOKEN_MULTIPLE = 8
HEAD_ROWS = 256  # of a prompt go through the head at once


InStep = Callable[[bytes], AbstractContextManager[None]]  # `Workers.in_step`


class PromptLogprobs(NamedTuple):
    """Log-probabilities of prompt tokens start … of a sequence, on their way to the CPU: see layers.sampler.logprobs."""

    seq: Sequence
    start: int
    tensors: tuple[Tensor, ...]


class Launched(NamedTuple):
    """A step on its way to its logits, of its sampled sequences in order."""

    sequences: list[Sequence]
    logits: Tensor  # [S, vocabulary]
    rows: Tensor  # [S] int32
    positions: Tensor  # [S] int32, of the tokens to be drawn
    prompt_logprobs: list[PromptLogprobs]


class PromptRead(NamedTuple):
    """Hidden states `row` … of a step say how likely the tokens `start` … `end` - 1 of a prompt are."""

    seq: Sequence
    start: int
    end: int
    row: int


@dataclass
class SampledTokens:
    """The tokens of a launched step, and log-probabilities that were asked for, on their way to the CPU."""

    sequences: list[Sequence]
    token_ids: Tensor  # [S]
    logprobs: tuple[Tensor, ...]  # of the sequences that ask: see layers.sampler.logprobs; empty if none does
    prompt_logprobs: list[PromptLogprobs]
    copied: torch.cuda.Event | None  # reached when all are on the CPU

    def result(self) -> Iterator[tuple[Sequence, int, LogprobRow | None]]:
        """Wait for the tokens; for each sequence its token and, if it asks, what `logprobs` says of it.

        Log-probabilities of prompts are handed to their sequences.
        """
        if self.copied is not None:
            self.copied.synchronize()
        for seq, start, tensors in self.prompt_logprobs:
            seq.prompt_logprobs[start : start + len(tensors[0])] = _rows(tensors)
        rows = _rows(self.logprobs)
        for seq, token_id in zip(self.sequences, self.token_ids.tolist(), strict=True):
            logprobs, num_top = None, seq.params.logprobs
            if num_top is not None:
                logprob, rank, values, ids = next(rows)
                num_top = len(ids) if num_top == -1 else num_top
                logprobs = logprob, rank, values[:num_top], ids[:num_top]
            yield seq, token_id, logprobs


def _to_cpu(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)


def _rows(tensors: tuple[Tensor, ...]) -> Iterator[LogprobRow]:
    """What `logprobs` found, row by row. Tuples of numbers are nothing that the garbage collector goes on visiting."""
    if not tensors:
        return iter(())
    own, ranks, top, top_ids = (tensor.tolist() for tensor in tensors)
    return zip(own, ranks, map(tuple, top), map(tuple, top_ids), strict=True)


def find_model(config: Config) -> tuple[Path, ModelConfig]:
    """The folder of a model, and its architecture in the data type that the options ask for."""
    model_class = Decoder if config.model_class is None else config.model_class
    if not issubclass(model_class, Decoder):
        raise TypeError(f"model_class must be a subclass of Decoder, got {model_class!r}")
    folder = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder, model_class.read_config)
    return folder, replace(model_config, dtype=config.torch_dtype(model_config.dtype))


class ModelRunner:
    """Runs steps of one model on one device, its share of it if there are several. `num_blocks` is the size of the KV
    pool that it made."""

    def __init__(self, config: Config, folder: Path, model_config: ModelConfig, group: Group):
        self.group = group
        self.device = group.device
        self.model_config = model_config
        self.max_len = max_len = min(config.max_model_len, model_config.max_len)
        num_heads = group.share(model_config.num_heads).size
        self.num_kv_heads = group.share(model_config.num_kv_heads).size
        self.backend = attention.select(
            config.attention_backend,
            replace(model_config, num_heads=num_heads, num_kv_heads=self.num_kv_heads),
            self.device,
            config.kvcache_block_size,
        )
        self.block_size = config.kvcache_block_size or self.backend.block_size
        self.head_rows = min(HEAD_ROWS, config.max_num_seqs)
        self.compiles = self.device.type == "cuda" and kernels.AVAILABLE and not config.enforce_eager
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self._start_free, _ = torch.cuda.mem_get_info(self.device)
            self._start_reserved = torch.cuda.memory_reserved(self.device)
        num_rows = config.max_num_seqs + 1
        num_positions = max(max_len, TOKEN_MULTIPLE)  # padding has positions too
        blocks_per_row = -(-num_positions // self.block_size)
        new_model = partial(config.model_class or Decoder, model_config, self.backend, group, num_positions)
        if self.device.type == "cuda":
            _, total = torch.cuda.mem_get_info(self.device)
            with torch.device("meta"):
                weights = sum(parameter.nbytes for parameter in new_model().parameters())
            check_weights_fit(weights, total, config.gpu_memory_utilization, group.size)
        with torch.device(self.device):
            self.model = new_model()
            self.tables = DeviceTables(
                block_tables=torch.zeros(num_rows, blocks_per_row, dtype=torch.int32),
                last_token=torch.zeros(num_rows, dtype=torch.int32),
                sampling=torch.zeros(num_rows, 6, dtype=torch.int32),
            )
        # A row has 14 numbers and its attention plan, a token 3 and its plan, a new block-table entry 2.
        self.staging = Staging(
            num_rows * (40 + 2 * blocks_per_row) + config.max_num_batched_tokens * 8 + 65536, self.device
        )
        if config.load_format == "dummy":
            load_dummy(self.model)
        else:
            load_weights(self.model, folder, config.use_tqdm and group.rank == 0)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, Linear):
                    module.pack()
        if self.compiles:
            self.model.compile_layers()
        self.graphs: DecodeGraphs | None = None
        sizes = graph_sizes(config.max_num_seqs) if self.compiles and self.backend.capturable else []
        self.kv_cache = self._new_kv_cache(1)  # until it is known how many fit
        self.num_blocks = group.least(self._choose_num_blocks(config, max_len, sizes))
        self.kv_cache = self._new_kv_cache(self.num_blocks)
        if sizes:
            self.graphs = DecodeGraphs(self._start_trash_decode, sizes)
            self._warm_up_head(sizes)

    def forward(self, step: Step, in_step: InStep | None = None) -> Launched:
        """Launch a step up to its logits; return at once. `in_step`, if there are other ranks, sends it to them."""
        packed, reads = self._pack(step)
        with in_step(packed.to_bytes()) if in_step else nullcontext():
            logits, rows, positions, logprobs = self.run(packed)
        prompt_logprobs = [
            PromptLogprobs(seq, start, tensors) for (seq, start, _, _), tensors in zip(reads, logprobs, strict=True)
        ]
        return Launched(step.sampled, logits[: len(rows)], rows, positions, prompt_logprobs)

    @torch.inference_mode()
    def run(self, packed: PackedStep) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """This rank's part of a step. Decode rows are a batch, and replayed; chunks are another.

        Returns logits, of at least as many rows as are sampled, the rows and positions [S] that these belong to, and what
        `logprobs` says of each prompt read, on its way to the CPU. Logits mean something on rank 0 alone.
        """
        # Decode rows are the first: they must arrive where the graphs read them.
        decode_views, update_views, chunk_views, sampled_views, read_views = self.staging.upload(*packed)
        rows, positions, last_tokens = sampled_views
        self._apply_updates(update_views)
        self.group.broadcast(self.tables.last_token)  # rank 0 has drawn them
        hidden = []
        logprobs = []
        if packed.decodes:
            size = len(packed.decodes[0])
            decodes = HostBatch(True, packed.decodes)
            replayed = self.graphs.replay(size) if self.graphs else self._compute(decodes, decode_views)
            hidden.append(replayed[: len(rows) - len(last_tokens)] if packed.chunks else replayed)
        if packed.chunks:
            computed = self._compute(HostBatch(False, packed.chunks), chunk_views)
            logprobs = self._read_prompts(packed.prompt_reads[0].tolist(), read_views[1], computed)
            hidden.append(computed[last_tokens])
        logits = self._logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        return logits, rows, positions, logprobs

    @torch.inference_mode()
    def sample(self, launched: Launched) -> SampledTokens:
        """Launch the sampling of a step whose predecessor is committed, so that every sequence is known in full.

        A sequence that the predecessor finished is sampled for nothing: its token is passed over.
        """
        sequences, raw_logits, rows, positions, prompt_logprobs = launched
        token_ids = torch.empty(0, dtype=torch.int32)
        asked: tuple[Tensor, ...] = ()
        if sequences:
            special = [(i, seq) for i, seq in enumerate(sequences) if not seq.is_plain]
            logits = raw_logits
            if any(seq.adjusts_logits for _, seq in special):
                logits = adjust(raw_logits, sequences, self._send)
            batch = SamplingBatch(
                self.tables.sampling,
                rows,
                positions,
                is_random=any(seq.params.temperature > 0 for seq in sequences),
                is_truncated=any(seq.params.is_truncated for _, seq in special),
            )
            token_ids = sample(logits, batch, self.tables.last_token)
            asked = self._logprobs(special, raw_logits, token_ids)
        token_ids, asked = token_ids.to("cpu", non_blocking=True), _to_cpu(asked)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        return SampledTokens(sequences, token_ids, asked, prompt_logprobs, copied)

    def close(self) -> None:
        """Before the group is aborted. The memory is given back when the runner is gone."""
        if self.graphs:
            self.graphs.close()

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compute(self, host: HostBatch, views: list[Tensor]) -> Tensor:
        """Hidden states [T, hidden] of a batch whose arrays are on the device."""
        batch = host.on_device(views, self.tables, self.block_size)
        batch.attention = self.backend.prepare(batch)
        return self.model(batch, self.kv_cache)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of at least as many rows: in the sizes of the graphs, for which the libraries' kernels are loaded."""
        if self.graphs and len(hidden):
            num_padding = self.graphs.size_for(len(hidden)) - len(hidden)
            hidden = F.pad(hidden, (0, 0, 0, num_padding)) if num_padding else hidden
        return self.model.logits(hidden)

    @torch.inference_mode()
    def _warm_up_head(self, sizes: list[int]) -> None:
        """Load the kernels of the head: they differ with the size, and loading one takes longer than a step."""
        for size in sizes:
            self._logits(self.model.norm.weight.new_zeros(size, self.model_config.hidden_size))
        self.synchronize()

    def _start_trash_decode(self, size: int) -> Callable[[], Tensor]:
        """Send a decode step of trash rows to where every decode step's arrays are; returns what computes it."""
        host = pack_decodes([], [], size, self.backend)
        (views,) = self.staging.upload(host.arrays)
        return torch.inference_mode()(lambda: self._compute(host, views))

    def _pack(self, step: Step) -> tuple[PackedStep, list[PromptRead]]:
        num_decodes = len(step.decodes)
        decodes: list[INT] = []
        chunks: list[INT] = []
        if step.decodes:
            size = self.graphs.size_for(num_decodes) if self.graphs else num_decodes
            decodes = pack_decodes(step.decodes, step.context_lens, size, self.backend).arrays
        if step.chunks:
            num_padding = -step.num_prefill_tokens % TOKEN_MULTIPLE if self.compiles else 0
            chunks = pack_chunks(step.chunks, num_padding, self.backend).arrays
        ends = accumulate(chunk.num_tokens for chunk in step.chunks)
        last_tokens = [end - 1 for end, chunk in zip(ends, step.chunks, strict=True) if chunk.is_sampled]
        positions = step.context_lens + [c.start + c.num_tokens for c in step.chunks if c.is_sampled]
        rows = [seq.row for seq in step.sampled]
        entry_rows, indices, blocks = int32(step.block_updates).reshape(-1, 3).T
        places = entry_rows * self.tables.block_tables.shape[1] + indices
        vocab_size = self.model_config.vocab_size
        sampling = [pack_sampling(seq.params, seq.seed, vocab_size) for seq in step.admitted]
        reads = self._prompt_reads(step.chunks)
        read_rows = [(row, end - i, self._num_top([seq.params.prompt_logprobs])) for seq, i, end, row in reads]
        read_tokens = [token_id for seq, start, end, _ in reads for token_id in seq.token_ids[start:end]]
        packed = PackedStep(
            decodes=decodes,
            updates=[places, blocks, int32([seq.row for seq in step.admitted]), int32(sampling)],
            chunks=chunks,
            sampled=[int32(rows), int32(positions), int32(last_tokens)],
            prompt_reads=[int32(read_rows).reshape(-1, 3), int32(read_tokens)],
        )
        return packed, reads

    def _apply_updates(self, views: list[Tensor]) -> None:
        places, blocks, rows, sampling = views
        if len(places):
            self.tables.block_tables.view(-1)[places] = blocks
        if len(rows):
            self.tables.sampling[rows] = sampling

    def _logprobs(self, special: list[tuple[int, Sequence]], logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        """Of the sequences that ask for them, as many as any of them asks for."""
        asking = [(i, seq.params.logprobs) for i, seq in special if seq.params.logprobs is not None]
        if not asking:
            return ()
        if len(asking) < len(logits):
            rows = self._send([i for i, _ in asking])
            logits, token_ids = logits[rows], token_ids[rows]
        return logprobs(logits, token_ids.long(), self._num_top([n for _, n in asking]))

    def _prompt_reads(self, chunks: list[ScheduledChunk]) -> list[PromptRead]:
        """Slices of the prompts that ask for log-probabilities and have not read them before a preemption."""
        reads = []
        at = 0  # the chunk's first token in the batch
        for seq, start, num_tokens, _ in chunks:
            if seq.awaits_prompt_logprobs:  # the hidden state of each token says how likely the next one is
                first = max(start + 1, len(seq.prompt_logprobs))
                end = min(start + num_tokens + 1, seq.num_prompt_tokens)
                for i in range(first, end, self.head_rows):
                    reads.append(PromptRead(seq, i, min(i + self.head_rows, end), at + i - 1 - start))
            at += num_tokens
        return reads

    def _read_prompts(self, reads: list[list[int]], token_ids: Tensor, hidden: Tensor) -> list[tuple[Tensor, ...]]:
        """For each read of a PackedStep what `logprobs` says of its tokens."""
        found = []
        at = 0
        for row, num_tokens, num_top in reads:
            logits = self._logits(hidden[row : row + num_tokens])[:num_tokens]
            if self.group.rank == 0:
                read = token_ids[at : at + num_tokens].long()
                found.append(_to_cpu(logprobs(logits, read, num_top)))
            at += num_tokens
        return found

    def _num_top(self, asked: list[int | None]) -> int:
        return max(self.model_config.vocab_size if n == -1 else n or 0 for n in asked)

    def _send(self, values: ArrayLike) -> Tensor:
        return upload(torch.as_tensor(np.asarray(values)), self.device)

    def _new_kv_cache(self, num_blocks: int) -> list[KVCache]:
        """Each layer's keys and values [blocks, block_size, H_kv, D] in one piece of memory.

        It starts as zeros: a masked value still takes part in attention, and a NaN would spread. On the CPU they come from
        numpy, whose zeros take no memory until they are written, where PyTorch's take it all at once.
        """
        c = self.model_config
        shape = (c.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, c.head_dim)
        if self.device.type == "cpu":
            num_bytes = math.prod(shape) * c.dtype.itemsize
            cache = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(c.dtype).view(shape)
        else:
            cache = torch.zeros(shape, dtype=c.dtype, device=self.device)
        return [KVCache(k, v) for k, v in cache]

    def _choose_num_blocks(self, config: Config, max_len: int, sizes: list[int]) -> int:
        """The number of blocks that the options and the memory allow; ValueError if they hold too little."""
        block_bytes = sum(cache.k.nbytes + cache.v.nbytes for cache in self.kv_cache)
        needed = -(-max_len // self.block_size) + 1  # and the trash block
        if self.device.type == "cuda":
            num_blocks = self._cuda_pool_bytes(config, max_len, block_bytes, sizes) // block_bytes
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

    def _cuda_pool_bytes(self, config: Config, max_len: int, block_bytes: int, sizes: list[int]) -> int:
        """What a profiled largest step and the graphs of `sizes` leave of our share, or what the options ask for, if
        that much is free."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        self._run_largest_steps(config, max_len)
        peak = torch.cuda.max_memory_reserved(self.device) - reserved
        peak += self._graph_bytes(sizes)
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

    def _graph_bytes(self, sizes: list[int]) -> int:
        """What graphs of `sizes` will take: one of the largest its memory, which all share, and each a little more."""
        if not sizes:
            return 0
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        taken = []
        for few in (sizes[-1:], sizes[-3:]):
            graphs = DecodeGraphs(self._start_trash_decode, few)
            torch.cuda.empty_cache()
            taken.append(free - torch.cuda.mem_get_info(self.device)[0])
            del graphs
            torch.cuda.empty_cache()
        largest, three = taken
        return largest + max(0, three - largest) * len(sizes) // 2

    def _run_largest_steps(self, config: Config, max_len: int) -> None:
        """Run the steps that take the most memory, on row 0 and block 0: longest prompts, then most sequences."""
        plain = SamplingParams()
        demanding = SamplingParams(top_p=0.9), SamplingParams(top_p=0.9, logprobs=0, presence_penalty=1.0)
        prompts, decodes = Step(), Step()
        num_tokens = config.max_num_batched_tokens
        while num_tokens and len(prompts.chunks) < config.max_num_seqs:
            seq = Sequence(0, [0] * min(num_tokens, max_len), plain, seed=0, max_tokens=1)
            prompts.chunks.append(ScheduledChunk(seq, 0, len(seq.token_ids), is_sampled=True))
            num_tokens -= len(seq.token_ids)
        for _ in range(min(config.max_num_seqs, config.max_num_batched_tokens)):
            decodes.decodes.append(Sequence(0, [0], plain, seed=0, max_tokens=1))
            decodes.context_lens.append(max_len)
        for step in (prompts, decodes):
            launched = self.forward(step)
            for params in (plain, *demanding) if self.group.rank == 0 else ():  # the others do not sample
                sequences = [Sequence(0, [0], params, seed=0, max_tokens=1) for _ in launched.sequences]
                self.sample(launched._replace(sequences=sequences))
            del launched  # its logits are not there while the next step runs
            self.synchronize()
