"""Scheduler: owns the sequences and their blocks, plans steps, and takes their tokens.

There is one phase. Each sequence has `num_computed_tokens` catch up with its length, under one token budget a
step: chunked prefill, prefix hits, mixing with decode and resuming after a preemption are the same arithmetic.
Planning needs counts only, so a step is planned before the tokens of the one before are drawn.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import NOT_DRAWN, Sequence
from nanovllm.outputs import LogprobRow

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ScheduledChunk:
    """Tokens of a sequence that a step computes: positions start … start+num_tokens-1."""

    seq: Sequence
    start: int
    num_tokens: int
    is_sampled: bool  # it reaches the sequence's end, so that a new token is drawn
    scored: range = range(0)  # the prompt positions whose log-probability it gives: token i from hidden state i - 1

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass
class Step:
    """What one launch computes: the last tokens of running sequences, which the device has, and chunks of prompts.

    Beside them, what the device must learn: the sequences new to their rows, and the block-table entries new to it.
    """

    decodes: list[ScheduledChunk] = field(default_factory=list)
    chunks: list[ScheduledChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    block_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in its table, block)

    @property
    def sampled(self) -> list[ScheduledChunk]:
        """Those after which a token is drawn, in the order of their logits."""
        return self.decodes + [chunk for chunk in self.chunks if chunk.is_sampled]

    @property
    def num_decode_tokens(self) -> int:
        return len(self.decodes)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Plans with `schedule()` and learns with `commit()`. Rows 1 … max_num_seqs are handed out; row 0 is trash."""

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.requests: dict[int, list[Sequence]] = {}  # the unfinished sequences of each, by its id
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # the next one first
        self.running: list[Sequence] = []  # oldest first
        self.free_rows = list(range(max_num_seqs, 0, -1))
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens looked up in the prefix cache, and tokens found
        self.num_prefix_hits = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.requests.setdefault(seq.request_id, []).append(seq)
        self.waiting[seq] = None

    def abort(self, request_ids: Iterable[int]) -> None:
        """Finish these requests, where they still run or wait, with reason "abort", and free what they hold."""
        for request_id in request_ids:
            for seq in list(self.requests.get(request_id, ())):
                seq.finish("abort", None, time.time())
                self._put_away(seq)

    def schedule(self) -> Step | None:
        """Plan the next step, counting it as computed at once; None if no sequence has a token to compute now."""
        step = Step()
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(step, self.max_num_batched_tokens)
        if self.num_preemptions == num_preemptions and self._admits():
            self._schedule_waiting(step, budget)
        return step if step.decodes or step.chunks else None

    def commit(
        self,
        step: Step,
        token_ids: Iterable[int | None],
        logprobs: Iterable[LogprobRow] = (),
        prompt_logprobs: Iterable[LogprobRow] = (),
    ) -> None:
        """Take what a step gave: a token for each sampled sequence, and the log-probabilities that were asked for. What that
        finishes is put away.

        A sequence that was finished before (aborted) is passed over. One from whose logits no token can be drawn (None) is
        finished, and a warning names its request.
        """
        logprobs, prompt_logprobs = iter(logprobs), iter(prompt_logprobs)
        for chunk in step.chunks:
            chunk.seq.append_prompt_logprobs(islice(prompt_logprobs, len(chunk.scored)))
        block_size, now = self.block_manager.block_size, time.time()
        not_drawn = set()
        for chunk, token_id in zip(step.sampled, token_ids, strict=True):
            seq = chunk.seq
            row = None if seq.params.logprobs is None else next(logprobs)
            if seq.is_finished:
                continue
            seq.append(token_id, row, now)
            if token_id is None:  # the next step has read token 0, and not this one: its block is not cached
                not_drawn.add(seq.request_id)
            elif seq.is_running and seq.num_computed_tokens >= (len(seq.prefix_ids) + 1) * block_size:
                self.block_manager.register(seq)
            if seq.is_finished:
                self._put_away(seq)
        if not_drawn:
            logger.warning("requests %s are aborted: %s", sorted(not_drawn), NOT_DRAWN)

    def _schedule_running(self, step: Step, budget: int) -> int:
        """Plan for the running sequences, oldest first, preempting the newest ones where blocks run out; what is left."""
        block_size = self.block_manager.block_size
        for seq in self.running[:]:
            if not budget or not seq.is_running:  # it was preempted for an older one, as are all that follow
                break
            if seq.reaches_length:
                continue
            num_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            end = seq.num_computed_tokens + num_tokens
            if end > len(seq.block_table) * block_size and not self._extend(step, seq, end):
                break
            self._plan(step, seq, num_tokens)
            budget -= num_tokens
        return budget

    def _extend(self, step: Step, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` room for its tokens, at the expense of newer ones; False if it is the newest, and preempted."""
        num_known = len(seq.block_table)
        while not self.block_manager.extend(seq, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        step.block_updates += [(seq.row, i, seq.block_table[i]) for i in range(num_known, len(seq.block_table))]
        return True

    def _admits(self) -> bool:
        """Admit in bunches: a step that mixes a few prompts with many decode rows is the slowest kind."""
        num_free = len(self.free_rows)
        return not self.running or num_free >= len(self.waiting) or num_free * 16 >= self.max_num_seqs

    def _schedule_waiting(self, step: Step, budget: int) -> None:
        manager = self.block_manager
        while self.waiting and budget and self.free_rows:
            seq = next(iter(self.waiting))
            cached = manager.match(seq)
            num_cached = len(cached) * manager.block_size
            num_tokens = min(len(seq.token_ids) - num_cached, budget)
            num_new = -(-(num_cached + num_tokens) // manager.block_size) - len(cached)
            num_free = len(manager.free) - sum(manager.ref_counts[block] == 0 for block in cached)
            if num_new + len(self.running) > num_free and self.running:  # leave each running one its next block
                return
            self.running.append(seq)  # an interrupted sequence is in one of the two at any time
            del self.waiting[seq]
            manager.share(seq, cached)
            seq.row = self.free_rows.pop()
            step.admitted.append(seq)
            seq.num_computed_tokens = num_cached
            seq.num_admitted_tokens = len(seq.token_ids)
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = num_cached
            self.num_prefix_queries += len(seq.token_ids)
            self.num_prefix_hits += num_cached
            extended = manager.extend(seq, num_cached + num_tokens)
            assert extended, "the pool holds less than one sequence"
            step.block_updates += [(seq.row, i, block) for i, block in enumerate(seq.block_table)]
            self._plan(step, seq, num_tokens)
            budget -= num_tokens

    def _plan(self, step: Step, seq: Sequence, num_tokens: int) -> None:
        start = seq.num_computed_tokens
        seq.num_computed_tokens += num_tokens
        is_sampled = seq.num_computed_tokens == seq.num_tokens
        chunk = ScheduledChunk(seq, start, num_tokens, is_sampled)
        if start < seq.num_admitted_tokens:
            if seq.awaits_prompt_logprobs:
                first = max(start + 1, len(seq.prompt_logprobs))  # not again what was scored before a preemption
                chunk.scored = range(first, min(chunk.end + 1, seq.num_prompt_tokens))
            step.chunks.append(chunk)
            # A later sequence of this step may share these blocks: a layer stores the KV of all before any attends.
            self.block_manager.register(seq)
        else:
            step.decodes.append(chunk)
        seq.num_pending += is_sampled

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue; what it computed is lost but for what stays in the prefix cache."""
        self.waiting[seq] = None
        self.waiting.move_to_end(seq, last=False)
        self._leave_row(seq)
        seq.num_computed_tokens = 0
        self.num_preemptions += 1

    def _put_away(self, seq: Sequence) -> None:
        """Hand a finished sequence out, and take back what it holds."""
        seq.ended[seq] = None
        if seq.is_running:
            self._leave_row(seq)
        else:  # it waits, perhaps preempted while its last token was on its way
            self.waiting.pop(seq, None)  # Ctrl-C may have come when it was to be queued
        samples = self.requests[seq.request_id]
        samples.remove(seq)
        if not samples:
            del self.requests[seq.request_id]

    def _leave_row(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.block_manager.release(seq)
        self.free_rows.append(seq.row)
        seq.row = 0
