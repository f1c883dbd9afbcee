"""ModelRunner: owns the device: weights, KV cache, the rows' tables. It launches steps and never waits for the device.

On a GPU nothing between planning a step and sampling it synchronises; the only wait for the device is `StepInFlight.wait`. Where
sequences have grammars, `sample` waits for their masks, which a thread computes.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm.attention import AttentionBackend
from nanovllm.config import Config, ModelConfig
from nanovllm.engine.batch import (
    TOKEN_MULTIPLE,
    Batch,
    DeviceTables,
    KVCache,
    PackedStep,
    int32,
    pack_chunks,
    pack_decodes,
    padding,
)
from nanovllm.engine.cuda_graphs import DecodeGraphs
from nanovllm.engine.scheduler import ScheduledChunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.layers.sampler import SamplingBatch, pack_sampling, sample
from nanovllm.models.decoder import Decoder
from nanovllm.outputs import LogprobRow
from nanovllm.parallel.group import Group

HEAD_ROWS = 256  # positions of a prompt that go through the head at once, for their log-probabilities

NO_TOKENS = torch.empty(0, dtype=torch.int32)

Logprobs = tuple[Tensor, ...]  # see extras.logprobs.logprobs; empty if nobody asks


@dataclass
class StepInFlight:
    """A step on the device: launched up to its logits, then sampled, its results on their way to the CPU. The next forward
    overwrites its logits, rows and positions."""

    step: Step
    logits: Tensor | None  # [S, vocabulary] on rank 0, of `step.sampled`; None when they are sampled
    rows: Tensor  # [S] int32, of the tables
    positions: Tensor  # [S] int32, of the tokens to be drawn
    prompt_logprobs: list[Logprobs]  # of the tokens that the chunks score, in slices
    token_ids: Tensor = NO_TOKENS  # [S]; a graph draws them as for rows that ask for nothing special
    logprobs: Logprobs = ()  # of the sequences that ask for them
    copied: torch.cuda.Event | None = None  # reached when all are on the CPU
    has_grammars: bool = False  # some of its sequences have one, which is to learn their tokens

    def wait(self) -> tuple[list[int | None], list[LogprobRow], list[LogprobRow]]:
        """Wait for the results: a token for each sampled sequence, None if none can be drawn; the log-probabilities of those
        sequences that ask for them; and those of the prompt tokens that the chunks score."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids = [None if token_id < 0 else token_id for token_id in self.token_ids.tolist()]
        return token_ids, _rows([self.logprobs]), _rows(self.prompt_logprobs)


def _rows(slices: Iterable[Logprobs]) -> list[LogprobRow]:
    return [row for tensors in slices for row in zip(*(tensor.tolist() for tensor in tensors), strict=True)]


class ModelRunner:
    """Runs steps of one model on one device, its share of it if there are several.

    It starts with a KV pool of one block and no graphs; `engine.startup` makes them as large as memory allows.
    """

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        model: Decoder,
        backend: AttentionBackend,
        group: Group,
        max_len: int,
    ):
        self.model_config = model_config
        self.model = model
        self.backend = backend
        self.group = group
        self.max_len = max_len
        self.device = group.device
        self.block_size = config.kvcache_block_size or backend.block_size
        self.head_rows = min(HEAD_ROWS, config.max_num_seqs)
        self.tables = DeviceTables(config, max(max_len, TOKEN_MULTIPLE), self.block_size, self.device)
        self.prefixes = SharedPrefixes(config.max_num_seqs + 1, self.tables.blocks_per_row, self.block_size)
        self.graphs = DecodeGraphs()
        self.allocate_kv_cache(1)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Each layer's keys and values [blocks, block_size, H_kv, D], in one piece of memory.

        It starts as zeros: a masked value still takes part in attention, and a NaN would spread. On the CPU they come from
        numpy, whose zeros take no memory until they are written, where PyTorch's take it all at once.
        """
        c = self.model_config
        num_kv_heads = self.group.share(c.num_key_value_heads).size
        shape = (c.num_hidden_layers, 2, num_blocks, self.block_size, num_kv_heads, c.head_dim)
        if self.device.type == "cpu":
            cache = torch.from_numpy(np.zeros((*shape, c.dtype.itemsize), np.uint8)).view(c.dtype).squeeze(-1)
        else:
            cache = torch.zeros(shape, dtype=c.dtype, device=self.device)
        self.num_blocks = num_blocks
        self.kv_cache = [KVCache(k, v) for k, v in cache]

    def pack(self, step: Step) -> PackedStep:
        """What all ranks must know of a step. Decode rows are padded to the size of a graph."""
        decodes, chunks, batches = step.decodes, step.chunks, []
        table_indices, table_blocks = self.prefixes.update(step)
        if decodes:
            num_padding = self.graphs.padded_size(len(decodes)) - len(decodes)
            batch = pack_decodes(decodes + [padding(1)] * num_padding, self.backend, self.prefixes)
            # Where no chunks follow, padding has logits too: to leave it out would cost a copy.
            batches.append(batch._replace(logits_indices=slice(len(decodes) if chunks else None)))
        if chunks:
            num_padding = -step.num_prefill_tokens % TOKEN_MULTIPLE if self.model.is_compiled else 0
            batches.append(pack_chunks([*chunks, padding(num_padding)] if num_padding else chunks, self.backend))
        vocab_size, sampled = self.model_config.vocab_size, step.sampled
        return PackedStep(
            batches=batches,
            table_indices=table_indices,
            table_blocks=table_blocks,
            new_rows=int32([seq.row for seq in step.admitted]),
            new_sampling=int32([pack_sampling(seq.params, seq.seed, vocab_size) for seq in step.admitted]),
            sampled_rows=int32([chunk.seq.row for chunk in sampled]),
            sampled_positions=int32([chunk.end for chunk in sampled]),
            scored_slices=self._scored_slices(chunks),
            scored_ids=int32([chunk.seq.token_ids[i] for chunk in chunks for i in chunk.scored]),
        )

    def _scored_slices(self, chunks: list[ScheduledChunk]) -> list[tuple[int, int, int]]:
        slices = []
        for batch_end, chunk in zip(accumulate(chunk.num_tokens for chunk in chunks), chunks, strict=True):
            num_top = self._num_top([chunk.seq.params.prompt_logprobs])
            for i in chunk.scored[:: self.head_rows]:
                row = batch_end - chunk.end + i - 1  # the hidden state of the token before token i
                slices.append((row, min(self.head_rows, chunk.scored.stop - i), num_top))
        return slices

    @torch.inference_mode()
    def forward(self, packed: PackedStep, step: Step) -> StepInFlight:
        """Launch this rank's part of a packed step up to its logits; return at once. Rank 0 alone knows the `step` itself."""
        sent = self.tables.upload(packed)
        self.tables.update(sent)
        self.group.broadcast(self.tables.last_token)  # rank 0 has drawn them
        hidden, logits, token_ids = [], None, NO_TOKENS
        for batch, sent_batch in zip(packed.batches, sent.batches, strict=True):
            if batch.is_decode and self.graphs.sizes:
                last, logits, token_ids = self.graphs.replay(len(batch.rows))
            else:
                last, logits = self._compute(self.tables.batch(batch, sent_batch)), None
            hidden.append(last)
        prompt_logprobs = self._score_prompts(packed.scored_slices, sent.scored_ids, hidden[-1])
        if logits is None:
            rows = [h[batch.logits_indices] for h, batch in zip(hidden, sent.batches, strict=True)]
            logits, token_ids = self._logits(rows[0] if len(rows) == 1 else torch.cat(rows)), NO_TOKENS
        num, sampled = len(sent.sampled_rows), (sent.sampled_rows, sent.sampled_positions)
        return StepInFlight(step, logits[:num], *sampled, prompt_logprobs, token_ids[:num])

    def _compute(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] of a batch."""
        batch.attn_metadata = self.backend.prepare(batch)
        return self.model(batch, self.kv_cache)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of the rows and of padding after them, up to a graph's size, for which the libraries' kernels are loaded."""
        num_padding = self.graphs.padded_size(len(hidden)) - len(hidden)
        return self.model.logits(F.pad(hidden, (0, 0, 0, num_padding)) if num_padding else hidden)

    def _score_prompts(self, slices: list[tuple[int, int, int]], token_ids: Tensor, hidden: Tensor) -> list[Logprobs]:
        """For each slice of a PackedStep the log-probabilities of the tokens that it scores."""
        found = []
        for (row, num_tokens, num_top), ids in zip(slices, token_ids.split([n for _, n, _ in slices]), strict=True):
            logits = self._logits(hidden[row : row + num_tokens])[:num_tokens]
            if self.group.rank == 0:
                found.append(_read_logprobs(logits, ids, num_top))
        return found

    @torch.inference_mode()
    def sample(self, launched: StepInFlight) -> StepInFlight:
        """Launch the sampling of a step whose predecessor is committed, so that every sequence is known in full; returns the same.

        A sequence that has finished is still sampled; commit ignores its token.
        """
        raw_logits, launched.logits = launched.logits, None  # frees their memory for the next step
        assert raw_logits is not None, "a step is sampled once"
        sequences = [chunk.seq for chunk in launched.step.sampled]
        if sequences:
            with_extras = [(i, seq) for i, seq in enumerate(sequences) if seq.needs_extras]
            with_rules = [(i, seq) for i, seq in with_extras if seq.has_logit_rules and not seq.is_finished]
            logits, token_ids = raw_logits, launched.token_ids
            if with_rules:
                from nanovllm.extras.logit_rules import apply_rules

                logits = apply_rules(raw_logits, with_rules, self._to_device)
                launched.has_grammars = any(seq.grammar is not None for _, seq in with_rules)
            is_truncated = any(seq.params.is_truncated for _, seq in with_extras)
            if with_rules or is_truncated or not len(token_ids):  # else the graph has drawn them
                is_random = any(seq.params.temperature > 0 for seq in sequences)
                batch = SamplingBatch(self.tables.sampling, launched.rows, launched.positions, is_random, is_truncated)
                token_ids = sample(logits, batch, self.tables.last_token)
            launched.logprobs = self._logprobs(with_extras, raw_logits, token_ids)
            launched.token_ids = token_ids.to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            launched.copied = torch.cuda.current_stream(self.device).record_event()
        return launched

    def _logprobs(self, sequences: list[tuple[int, Sequence]], logits: Tensor, token_ids: Tensor) -> Logprobs:
        """Of the sequences that ask for them, as many as any of them asks for."""
        asking = [(i, seq.params.logprobs) for i, seq in sequences if seq.params.logprobs is not None]
        if not asking:
            return ()
        if len(asking) < len(logits):
            rows = self._to_device([i for i, _ in asking])
            logits, token_ids = logits[rows], token_ids[rows]
        return _read_logprobs(logits, token_ids.clamp(min=0), self._num_top([n for _, n in asking]))

    def _num_top(self, numbers: list[int | None]) -> int:
        return max(self.model_config.vocab_size if n == -1 else n or 0 for n in numbers)

    def _to_device(self, values: ArrayLike) -> Tensor:
        """Send without waiting. PyTorch gives pinned memory out again only when the copy from it is done."""
        array = np.asarray(values)
        tensor = torch.empty_like(torch.from_numpy(array), pin_memory=self.device.type == "cuda")
        tensor.numpy()[...] = array  # by this thread alone, where PyTorch would wake others
        return tensor.to(self.device, non_blocking=True)

    def upload_trash_decode(self, num_rows: int) -> Callable[[], tuple[Tensor, Tensor | None, Tensor]]:
        """Send a decode batch of trash rows to where every decode batch arrives; returns what computes its hidden states and,
        on one device, its logits and tokens."""
        packed = pack_decodes([padding(1)] * num_rows, self.backend, self.prefixes)
        sent = self.tables.upload(packed)

        def decode() -> tuple[Tensor, Tensor | None, Tensor]:
            hidden = self._compute(self.tables.batch(packed, sent))
            if self.group.size > 1:
                return hidden, None, NO_TOKENS
            logits = self.model.logits(hidden)
            plain = SamplingBatch(
                self.tables.sampling, sent.rows, sent.context_lens, is_random=True, is_truncated=False
            )
            return hidden, logits, sample(logits, plain, self.tables.last_token)

        return torch.inference_mode()(decode)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Load the kernels of the head, which differ with the size, and of sums: loading one takes longer than a step."""
        if self.group.peer_memory is not None:
            self.group.peer_memory.warm_up(self.model_config.dtype)
        for size in self.graphs.sizes:
            self._logits(self.model.norm.weight.new_zeros(size, self.model_config.hidden_size))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Before the group is closed, whose memory what was launched may still use. Other memory is given back when the
        runner is gone."""
        with suppress(RuntimeError):  # after an error the device may refuse everything
            self.synchronize()
        self.graphs.close()


def _read_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """`logprobs`, on its way to the CPU."""
    from nanovllm.extras.logprobs import logprobs

    return tuple(found.to("cpu", non_blocking=True) for found in logprobs(logits, token_ids.long(), num_top))
