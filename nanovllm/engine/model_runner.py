"""ModelRunner: owns the device: weights, KV cache, the rows' tables. It launches steps and never waits for them.

Nothing between planning a step and launching it synchronises; the only wait is `SampledTokens.result`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm import attention, kernels
from nanovllm.config import Config, ModelConfig, naming
from nanovllm.engine.batch import (
    INT,
    TOKEN_MULTIPLE,
    TRASH,
    TRASH_ROW,
    DeviceTables,
    KVCache,
    PackedStep,
    int32,
    pack_batch,
)
from nanovllm.engine.cuda_graphs import DecodeGraphs, graph_bytes, graph_sizes
from nanovllm.engine.memory import CudaMemory, available_host_memory, check_weights_fit, gib
from nanovllm.engine.scheduler import ScheduledChunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.linear import Linear, limit_onednn_caches
from nanovllm.layers.sampler import SamplingBatch, pack_sampling, sample
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import Tensors, fit_config, load_dummy, load_weights, match_tensors, read_headers
from nanovllm.outputs import LogprobRow
from nanovllm.parallel.group import Group
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

HEAD_ROWS = 256  # of a prompt go through the head at once

Logprobs = tuple[Tensor, ...]  # see extras.logprobs.logprobs; empty if nobody asks


class Launched(NamedTuple):
    """A step on its way to its logits, of its sampled sequences in order."""

    step: Step
    logits: Tensor  # [S, vocabulary]
    rows: Tensor  # [S] int32
    positions: Tensor  # [S] int32, of the tokens to be drawn
    prompt_logprobs: list[Logprobs]  # of what the chunks read, in slices, on their way to the CPU


@dataclass
class SampledTokens:
    """The tokens of a launched step, and log-probabilities that were asked for, on their way to the CPU."""

    step: Step
    token_ids: Tensor  # [S]
    logprobs: Logprobs  # of the sequences that ask
    prompt_logprobs: list[Logprobs]
    copied: torch.cuda.Event | None  # reached when all are on the CPU

    def result(self) -> list[tuple[Sequence, int | None, LogprobRow | None]]:
        """Wait for the tokens; for each sequence its token, None if none could be drawn, and, if it asks, what `logprobs`
        says of it.

        Log-probabilities of prompts are handed to their sequences.
        """
        if self.copied is not None:
            self.copied.synchronize()
        prompt_rows = chain.from_iterable(map(_rows, self.prompt_logprobs))
        for chunk in self.step.chunks:
            chunk.seq.append_prompt_logprobs(islice(prompt_rows, len(chunk.scored)))
        rows = _rows(self.logprobs)
        results: list[tuple[Sequence, int | None, LogprobRow | None]] = []
        for chunk, token_id in zip(self.step.sampled, self.token_ids.tolist(), strict=True):
            row = None if chunk.seq.params.logprobs is None else next(rows)
            results.append((chunk.seq, None if token_id < 0 else token_id, row))
        return results


def _read_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """`logprobs`, on its way to the CPU."""
    from nanovllm.extras.logprobs import logprobs

    return tuple(found.to("cpu", non_blocking=True) for found in logprobs(logits, token_ids.long(), num_top))


def _rows(tensors: Logprobs) -> Iterator[LogprobRow]:
    """What `logprobs` found, row by row."""
    return zip(*(tensor.tolist() for tensor in tensors), strict=True)


def read_model(config: Config, folder: Path) -> tuple[ModelConfig, Tensors]:
    """What a model's folder says: its architecture, in the data type that the options ask for, and its tensors."""
    model_class = Decoder if config.model_class is None else config.model_class
    if not issubclass(model_class, Decoder):
        raise TypeError(f"model_class must be a subclass of Decoder, got {model_class!r}")
    model_config = ModelConfig.from_folder(folder, model_class.read_config)
    model_config = replace(model_config, dtype=config.torch_dtype(model_config.dtype))
    if config.load_format == "dummy":
        return model_config, {}
    tensors = read_headers(folder)
    with naming(folder / "config.json"):
        return fit_config(model_config, tensors), tensors


class ModelRunner:
    """Runs steps of one model on one device, its share of it if there are several. `num_blocks` is the size of the KV
    pool that it made."""

    def __init__(self, config: Config, model_config: ModelConfig, tensors: Tensors, group: Group):
        self.config = config
        self.model_config = model_config
        self.group = group
        self.device = group.device
        memory = CudaMemory(self.device) if self.device.type == "cuda" else None
        num_heads = group.share(model_config.num_attention_heads).size
        self.num_kv_heads = group.share(model_config.num_key_value_heads).size
        local_config = replace(model_config, num_attention_heads=num_heads, num_key_value_heads=self.num_kv_heads)
        self.backend = attention.select(config.attention_backend, local_config, self.device, config.kvcache_block_size)
        self.block_size = config.kvcache_block_size or self.backend.block_size
        self.max_len = min(config.max_model_len, model_config.max_len)
        self.head_rows = min(HEAD_ROWS, config.max_num_seqs)
        if memory is None:
            limit_onednn_caches()
        self.compiles = memory is not None and kernels.AVAILABLE and not config.enforce_eager
        num_positions = max(self.max_len, TOKEN_MULTIPLE)  # padding has positions too
        self.model = self._load_model(memory, tensors, num_positions)
        self.tables = DeviceTables(config, num_positions, self.block_size, self.device)
        sizes = graph_sizes(config.max_num_seqs) if self.compiles and self.backend.capturable else []
        self.graphs = DecodeGraphs(self._start_trash_decode, [])
        self.kv_cache = self._new_kv_cache(1)  # until it is known how many fit
        self.num_blocks = group.least(self._choose_num_blocks(memory, sizes))
        self.kv_cache = self._new_kv_cache(self.num_blocks)
        self.graphs = DecodeGraphs(self._start_trash_decode, sizes)
        self._warm_up()

    def forward(self, step: Step, packed: PackedStep) -> Launched:
        """Launch a step, packed, up to its logits; return at once."""
        return Launched(step, *self.run(packed))

    @torch.inference_mode()
    def run(self, packed: PackedStep) -> tuple[Tensor, Tensor, Tensor, list[Logprobs]]:
        """This rank's part of a step: what a `Launched` says beside the step. Logits mean something on rank 0.

        Decode rows are a batch, and replayed; chunks are another.
        """
        # Decode rows are the first: they must arrive where the graphs read them.
        decode_views, update_views, chunk_views, sampled_views, scored_views = self.tables.upload(*packed)
        rows, positions, last_tokens = sampled_views
        self.tables.update(*update_views)
        self.group.broadcast(self.tables.last_token)  # rank 0 has drawn them
        hidden, prompt_logprobs = [], []
        if packed.decodes:
            size = len(packed.decodes[0])
            decoded = self.graphs.replay(size) if self.graphs else self._compute(True, packed.decodes, decode_views)
            hidden.append(decoded[: len(rows) - len(last_tokens)] if packed.chunks else decoded)
        if packed.chunks:
            computed = self._compute(False, packed.chunks, chunk_views)
            prompt_logprobs = self._score_prompts(packed.scored[0].tolist(), scored_views[1], computed)
            hidden.append(computed[last_tokens])
        logits = self._logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        return logits[: len(rows)], rows, positions, prompt_logprobs

    @torch.inference_mode()
    def sample(self, launched: Launched) -> SampledTokens:
        """Launch the sampling of a step whose predecessor is committed, so that every sequence is known in full.

        A sequence that has finished is still sampled; commit ignores its token.
        """
        step, raw_logits, rows, positions, prompt_logprobs = launched
        sequences = [chunk.seq for chunk in step.sampled]
        token_ids = torch.empty(0, dtype=torch.int32)
        asked: Logprobs = ()
        if sequences:
            special = [(i, seq) for i, seq in enumerate(sequences) if not seq.is_plain]
            asking = [(i, seq) for i, seq in special if seq.adjusts_logits and not seq.is_finished]
            logits = raw_logits
            if asking:
                from nanovllm.extras.logit_rules import adjust

                logits = adjust(raw_logits, asking, self._send)
            is_random = any(seq.params.temperature > 0 for seq in sequences)
            is_truncated = any(seq.params.is_truncated for _, seq in special)
            batch = SamplingBatch(self.tables.sampling, rows, positions, is_random, is_truncated)
            token_ids = sample(logits, batch, self.tables.last_token)
            asked = self._logprobs(special, raw_logits, token_ids)
        token_ids, copied = token_ids.to("cpu", non_blocking=True), None
        if self.device.type == "cuda":
            copied = torch.cuda.current_stream(self.device).record_event()
        return SampledTokens(step, token_ids, asked, prompt_logprobs, copied)

    def close(self) -> None:
        """Before the group is closed, whose memory what was launched may still use. Other memory is given back when the
        runner is gone."""
        with suppress(RuntimeError):  # after an error the device may refuse everything
            self.synchronize()
        self.graphs.close()

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pack(self, step: Step) -> PackedStep:
        """What all ranks must know of a step, its batches with padding."""
        chunks, num_padding = step.chunks, -step.num_prefill_tokens % TOKEN_MULTIPLE
        if num_padding and self.compiles:
            chunks = [*chunks, ScheduledChunk(TRASH, 0, num_padding, is_sampled=False)]
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        placed = list(zip(ends, chunks, strict=True))  # chunks, and where they end in their batch
        last_tokens = [end - 1 for end, chunk in placed if chunk.is_sampled]
        slices = []
        for end, chunk in placed:
            num_top = self._num_top([chunk.seq.params.prompt_logprobs])
            first_row = end - chunk.end - 1  # plus i: the hidden state of the token before token i
            for i in chunk.scored[:: self.head_rows]:
                slices.append((first_row + i, min(self.head_rows, chunk.scored.stop - i), num_top))
        scored_ids = [chunk.seq.token_ids[i] for chunk in chunks for i in chunk.scored]
        num_padding = self.graphs.size_for(len(step.decodes)) - len(step.decodes)
        sampled = step.sampled
        entry_rows, indices, blocks = int32(step.block_updates).reshape(-1, 3).T
        places = entry_rows * self.tables.block_tables.shape[1] + indices
        vocab_size = self.model_config.vocab_size
        sampling = [pack_sampling(seq.params, seq.seed, vocab_size) for seq in step.admitted]
        return PackedStep(
            decodes=pack_batch(True, step.decodes + [TRASH_ROW] * num_padding, self.backend),
            updates=[places, blocks, int32([seq.row for seq in step.admitted]), int32(sampling)],
            chunks=pack_batch(False, chunks, self.backend),
            sampled=[int32([c.seq.row for c in sampled]), int32([c.end for c in sampled]), int32(last_tokens)],
            scored=[int32(slices).reshape(-1, 3), int32(scored_ids)],
        )

    def _compute(self, is_decode: bool, arrays: list[INT], views: list[Tensor]) -> Tensor:
        """Hidden states [T, hidden] of a packed batch that arrived as `views`."""
        batch = self.tables.batch(is_decode, arrays, views)
        batch.attn_metadata = self.backend.prepare(batch)
        return self.model(batch, self.kv_cache)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of at least as many rows: in the sizes of the graphs, for which the libraries' kernels are loaded."""
        num_padding = self.graphs.size_for(len(hidden)) - len(hidden)
        return self.model.logits(F.pad(hidden, (0, 0, 0, num_padding)) if num_padding else hidden)

    def _score_prompts(self, slices: list[list[int]], token_ids: Tensor, hidden: Tensor) -> list[Logprobs]:
        """For each slice of a PackedStep what `logprobs` says of the tokens that it scores."""
        found = []
        for (row, num_tokens, num_top), ids in zip(slices, token_ids.split([n for _, n, _ in slices]), strict=True):
            logits = self._logits(hidden[row : row + num_tokens])[:num_tokens]
            if self.group.rank == 0:
                found.append(_read_logprobs(logits, ids, num_top))
        return found

    def _logprobs(self, special: list[tuple[int, Sequence]], logits: Tensor, token_ids: Tensor) -> Logprobs:
        """Of the sequences that ask for them, as many as any of them asks for."""
        asking = [(i, seq.params.logprobs) for i, seq in special if seq.params.logprobs is not None]
        if not asking:
            return ()
        if len(asking) < len(logits):
            rows = self._send([i for i, _ in asking])
            logits, token_ids = logits[rows], token_ids[rows]
        return _read_logprobs(logits, token_ids.clamp(min=0), self._num_top([n for _, n in asking]))

    def _num_top(self, asked: list[int | None]) -> int:
        return max(self.model_config.vocab_size if n == -1 else n or 0 for n in asked)

    def _send(self, values: ArrayLike) -> Tensor:
        """To the device without waiting. PyTorch gives pinned memory out again when what was sent from it is there."""
        array = np.asarray(values)
        tensor = torch.empty_like(torch.from_numpy(array), pin_memory=self.device.type == "cuda")
        tensor.numpy()[...] = array  # by this thread alone, where PyTorch would wake others
        return tensor.to(self.device, non_blocking=True)

    def _load_model(self, memory: CudaMemory | None, tensors: Tensors, num_positions: int) -> Decoder:
        """The model with its weights; ValueError, before it takes memory, if they do not fit."""
        config = self.config
        new_model = partial(config.model_class or Decoder, self.model_config, self.backend, self.group)
        with torch.device("meta"):
            planned = new_model(1)
        if tensors:
            match_tensors(planned, tensors)
        if memory:
            weights = sum(parameter.nbytes for parameter in planned.parameters())
            check_weights_fit(weights, memory.total, config.gpu_memory_utilization, self.group.size)
        with torch.device(self.device):
            model = new_model(num_positions)
        if config.load_format == "dummy":
            load_dummy(model)
        else:
            load_weights(model, tensors, config.use_tqdm and self.group.rank == 0)
        if self.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, Linear):
                    module.pack()
        if self.compiles:
            model.compile_layers()
        return model

    def _new_kv_cache(self, num_blocks: int) -> list[KVCache]:
        """Each layer's keys and values [blocks, block_size, H_kv, D] in one piece of memory.

        It starts as zeros: a masked value still takes part in attention, and a NaN would spread. On the CPU they come from
        numpy, whose zeros take no memory until they are written, where PyTorch's take it all at once.
        """
        c = self.model_config
        shape = (c.num_hidden_layers, 2, num_blocks, self.block_size, self.num_kv_heads, c.head_dim)
        if self.device.type == "cpu":
            cache = torch.from_numpy(np.zeros((*shape, c.dtype.itemsize), np.uint8)).view(c.dtype).squeeze(-1)
        else:
            cache = torch.zeros(shape, dtype=c.dtype, device=self.device)
        return [KVCache(k, v) for k, v in cache]

    def _choose_num_blocks(self, memory: CudaMemory | None, sizes: list[int]) -> int:
        """The number of blocks that the options and the memory allow; ValueError if they hold too little."""
        config, block_size, max_len = self.config, self.block_size, self.max_len
        block_bytes = sum(cache.k.nbytes + cache.v.nbytes for cache in self.kv_cache)
        num_blocks = config.num_kvcache_blocks
        if memory:
            peak = memory.peak_of(self._run_largest_steps)
            peak += graph_bytes(self._start_trash_decode, sizes, self.device) if sizes else 0
            num_blocks = memory.pool_bytes(config, block_bytes, peak) // block_bytes
        elif num_blocks == -1:
            wanted = -(-config.max_num_seqs * max_len // block_size) + 1
            num_blocks = min(wanted, available_host_memory() // 4 // block_bytes)
        needed = -(-max_len // block_size) + 1  # and the trash block
        if num_blocks < needed:
            raise ValueError(
                f"the KV pool has {num_blocks} blocks of {block_size} tokens, but one sequence of "
                f"max_model_len={max_len} tokens takes {needed}; lower max_model_len, or give the pool more "
                f"(num_kvcache_blocks, gpu_memory_utilization)"
            )
        weights, pool = gib(sum(p.nbytes for p in self.model.parameters())), gib(num_blocks * block_bytes)
        logger.info("weights %s; KV pool %s: %d blocks of %d tokens", weights, pool, num_blocks, block_size)
        return num_blocks

    def _run_largest_steps(self) -> None:
        """Run the steps that take the most memory, on row 0 and block 0: longest prompts, then most sequences."""
        max_len, num_tokens = self.max_len, self.config.max_num_batched_tokens
        longest = Sequence(0, [0] * max_len, SamplingParams(), seed=0, max_tokens=1)
        lens = [max_len] * (num_tokens // max_len) + [num_tokens % max_len]
        chunks = [ScheduledChunk(longest, 0, n, is_sampled=True) for n in lens[: self.config.max_num_seqs] if n]
        rows = [ScheduledChunk(longest, max_len - 1, 1, is_sampled=True)] * min(self.config.max_num_seqs, num_tokens)
        truncated = SamplingParams(top_p=0.9)
        demands = SamplingParams(), truncated, replace(truncated, logprobs=0, presence_penalty=1.0)
        for step in Step(chunks=chunks), Step(decodes=rows):
            launched = self.forward(step, self.pack(step))
            for params in demands if self.group.rank == 0 else ():  # the others do not sample
                row = ScheduledChunk(Sequence(0, [0], params, seed=0, max_tokens=1), 0, 1, is_sampled=True)
                self.sample(launched._replace(step=Step(decodes=[row] * len(launched.rows))))
            del launched  # its logits are not there while the next step runs
            self.synchronize()

    def _start_trash_decode(self, size: int) -> Callable[[], Tensor]:
        """Send a decode step of trash rows to where every decode step's arrays are; returns what computes it."""
        arrays = pack_batch(True, [TRASH_ROW] * size, self.backend)
        (views,) = self.tables.upload(arrays)
        return torch.inference_mode()(lambda: self._compute(True, arrays, views))

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Load the kernels of the head, which differ with the size, and of sums: loading one takes longer than a step."""
        if self.group.peer_memory is not None:
            self.group.peer_memory.warm_up(self.model_config.dtype)
        for size in self.graphs.sizes:
            self._logits(self.model.norm.weight.new_zeros(size, self.model_config.hidden_size))
        self.synchronize()
