"""Structured outputs: completions that keep to a grammar, by llguidance, which says after each token what may follow."""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from threading import Semaphore
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import StructuredOutputsParams

# Exactly these separators: where spaces are free, some models write spaces without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

NUM_THREADS = 4  # waking more takes longer than what they do


class Grammar:
    """What a completion may still become, and which tokens may come next."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher = matcher  # llguidance's, which other threads use while masks are computed
        self.vocab_size = vocab_size
        self.is_valid = True  # the last token was allowed
        self.is_complete = False  # nothing may follow
        self.masks: Masks | None = None  # the batch that holds its next mask, when that is begun
        self.index = 0  # its place there

    def copy(self) -> "Grammar":
        return Grammar(self.matcher.deep_copy(), self.vocab_size)

    def take(self, token_id: int) -> None:
        """Take the next token of the completion."""
        self.masks = None
        # Where making the mask failed, it allowed the end alone.
        self.is_valid = self.matcher.consume_token(token_id) and not self.matcher.is_error()
        self.is_complete = self.matcher.is_stopped()


def new_grammar(
    params: StructuredOutputsParams, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]
) -> Grammar:
    """What the parameters ask for; each completion takes a copy.

    Raises:
        ValueError: llguidance is not installed, or refuses the grammar.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ValueError('structured_outputs needs llguidance: pip install "nanovllm[structured-outputs]"') from error
    try:
        if params.json is not None or params.json_object:
            schema = {"type": "object"} if params.json is None else params.json
            schema = json.loads(schema) if isinstance(schema, str) else dict(schema)
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        elif params.regex is not None:
            grammar = LLMatcher.grammar_from_regex(params.regex)
        elif params.choice:
            escaped = ("".join(f"\\x{{{ord(character):x}}}" for character in text) for text in params.choice)
            grammar = LLMatcher.grammar_from_regex("|".join(escaped))
        else:
            grammar = LLMatcher.grammar_from_lark(params.grammar)
        matcher = compiled(tokenizer, vocab_size, eos_token_ids, grammar)
    except (TypeError, ValueError) as error:
        raise ValueError(f"structured_outputs has {params}: {error}") from error
    if matcher.is_error():
        raise ValueError(f"structured_outputs has {params}: {matcher.get_error()}")
    return Grammar(matcher, vocab_size)


@lru_cache(maxsize=256)  # some take milliseconds
def compiled(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int], grammar: str) -> Any:
    from llguidance import LLMatcher

    return LLMatcher(guidance_tokenizer(tokenizer, vocab_size, eos_token_ids), grammar, log_level=0)


@lru_cache(maxsize=4)  # it takes a second
def guidance_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)


class Masks:
    """Which tokens may come next by each of some grammars, on their way: threads compute them while Python goes on."""

    def __init__(self, grammars: list[Grammar]):
        num_words = max((-(-grammar.vocab_size // 32) for grammar in grammars), default=0)
        # Sent to a GPU without waiting: PyTorch gives pinned memory out again only when the copy from it is done.
        pin_memory = torch.cuda.is_initialized()
        self.words = torch.empty(len(grammars), num_words, dtype=torch.int32, pin_memory=pin_memory)
        indexed = [(grammar.matcher, i) for i, grammar in enumerate(grammars)]
        begun = Semaphore(0)

        def compute(executor: Any, part: list[tuple[Any, int]]) -> None:
            begun.release()
            executor.unsafe_compute_mask_ptr(part, self.words.data_ptr(), num_words * 4, len(indexed))

        pool, executors = threads()
        parts = [indexed[i :: len(executors)] for i in range(min(len(executors), len(indexed)))]
        self._computed = [pool.submit(compute, *work) for work in zip(executors, parts, strict=False)]
        # A thread gives up Python's lock when it computes. One that has not begun would wait until this one gives it up.
        for _ in parts:
            begun.acquire()
        for i, grammar in enumerate(grammars):
            grammar.masks, grammar.index = self, i

    def wait(self) -> Tensor:
        """int32 [grammars, vocabulary / 32], of whose bits, the lowest first, those of allowed tokens are 1."""
        for computed in self._computed:
            computed.result()
        return self.words


@cache
def threads() -> tuple[ThreadPoolExecutor, list[Any]]:
    """Threads, and for each an executor of one: llguidance's own division of the work takes longer than most masks."""
    from llguidance import LLExecutor

    os.register_at_fork(after_in_child=threads.cache_clear)  # a fork does not copy them
    num_threads = min(NUM_THREADS, os.cpu_count() or 1)
    return ThreadPoolExecutor(num_threads, "masks"), [LLExecutor(num_threads=1) for _ in range(num_threads)]


def take_tokens(sequences: Iterable[Sequence], token_ids: Iterable[int | None]) -> None:
    """Give the grammars of these sequences their tokens, and start computing the next masks of those that go on."""
    going_on = []
    for seq, token_id in zip(sequences, token_ids, strict=True):
        if seq.grammar is not None and token_id is not None and not seq.is_finished:
            seq.grammar.take(token_id)
            if seq.grammar.is_valid and not seq.grammar.is_complete:
                going_on.append(seq.grammar)
    Masks(going_on)


def mask_logits(
    logits: Tensor, sequences: list[tuple[int, Sequence]], to_device: Callable[[ArrayLike], Tensor]
) -> None:
    """Set the logits of tokens that the sequences' grammars do not allow to -inf, in place. A completion's first mask is computed
    here."""
    if new := [seq.grammar for _, seq in sequences if seq.grammar.masks is None]:
        Masks(new)
    batches: dict[Masks, list[tuple[int, Sequence]]] = {}
    for i, seq in sequences:
        batches.setdefault(seq.grammar.masks, []).append((i, seq))
    for masks, members in batches.items():
        words = masks.wait()
        for _, seq in members:
            if seq.params.ignore_eos:
                _ban_end(words[seq.grammar.index].numpy().view(np.uint32), seq.eos_token_ids)
        rows, indices = to_device([(i, seq.grammar.index) for i, seq in members]).unbind(1)
        octets = words.to(logits.device, non_blocking=True).index_select(0, indices).view(torch.uint8)
        is_banned = (octets.unsqueeze(2) & _bits(logits.device) == 0).flatten(1)[:, : logits.shape[1]]
        if len(members) == len(logits):
            logits.masked_fill_(is_banned, -torch.inf)
        else:
            logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_banned, -torch.inf))


@cache
def _bits(device: torch.device) -> Tensor:
    return (1 << torch.arange(8, device=device)).byte()


def _ban_end(mask: NDArray[np.uint32], eos_token_ids: frozenset[int]) -> None:
    """Unless the completion can only end."""
    with_end = mask.copy()
    for token_id in eos_token_ids:
        mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    if not mask.any():
        mask[:] = with_end
