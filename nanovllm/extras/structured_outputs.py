"""Structured outputs: completions that keep to a grammar, by llguidance, which says after each token what may follow."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanovllm.engine.sequence import Sequence
from nanovllm.extras.logit_rules import Indexed, ToDevice
from nanovllm.sampling_params import StructuredOutputsParams

# Exactly these separators: where spaces are free, some models write spaces without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """What a completion may still become, and which tokens may come next."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher = matcher  # llguidance's, which another thread uses while masks are computed
        self.vocab_size = vocab_size
        self.is_valid = True  # the last token was allowed
        self.is_complete = False  # nothing may follow
        self.masks: Masks | None = None  # the batch that holds its next mask, when that is begun
        self.index = 0  # its place there

    def copy(self) -> "Grammar":
        return Grammar(self.matcher.deep_copy(), self.vocab_size)


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
    """Which tokens may come next by each of some grammars, on their way: a thread computes them while Python goes on."""

    def __init__(self, grammars: list[Grammar]):
        num_words = -(-grammars[0].vocab_size // 32)
        # Sent to a GPU without waiting: PyTorch gives pinned memory out again only when the copy from it is done.
        pin_memory = torch.cuda.is_initialized()
        self.words = torch.empty(len(grammars), num_words, dtype=torch.int32, pin_memory=pin_memory)
        for i, grammar in enumerate(grammars):
            grammar.masks, grammar.index = self, i
        indexed = [(grammar.matcher, i) for i, grammar in enumerate(grammars)]
        begun = SimpleQueue[None]()

        def compute() -> None:
            begun.put(None)
            executor.unsafe_compute_mask_ptr(indexed, self.words.data_ptr(), num_words * 4, len(indexed))

        thread, executor = worker()
        self._computed = thread.submit(compute)
        # The thread gives up Python's lock when it computes. Had it not begun, it would wait until this one gives it up.
        begun.get()

    def wait(self) -> Tensor:
        """int32 [grammars, vocabulary / 32], of whose bits, the lowest first, those of allowed tokens are 1."""
        self._computed.result()
        return self.words


@cache
def worker() -> tuple[ThreadPoolExecutor, Any]:
    """One thread, and what computes in it: the copies of a grammar share a lexer, which more threads would wait for in turn."""
    from llguidance import LLExecutor

    return ThreadPoolExecutor(1, "masks"), LLExecutor(num_threads=1)


os.register_at_fork(after_in_child=worker.cache_clear)  # a fork does not copy the thread


def take_tokens(sequences: Iterable[Sequence], token_ids: Iterable[int | None]) -> None:
    """Give the grammars of these sequences their tokens, and start computing the next masks of those that go on."""
    taken = [
        (seq.grammar, token_id)
        for seq, token_id in zip(sequences, token_ids, strict=True)
        if seq.grammar is not None and token_id is not None and not seq.is_finished
    ]
    worker()[1].consume_token_par([(grammar.matcher, token_id) for grammar, token_id in taken])
    going_on = []
    for grammar, _ in taken:
        grammar.masks = None
        if grammar.matcher.is_stopped():
            # A token that is not allowed is an error, and so is a mask that could not be made, which allowed the end alone.
            grammar.is_complete, grammar.is_valid = True, not grammar.matcher.is_error()
        else:
            going_on.append(grammar)
    if going_on:
        Masks(going_on)


def mask_logits(logits: Tensor, sequences: Indexed, to_device: ToDevice) -> None:
    """Set the logits of tokens that the sequences' grammars do not allow to -inf, in place. A completion's first mask is computed
    here."""
    grammars = [seq.grammar for _, seq in sequences]
    if new := [grammar for grammar in grammars if grammar.masks is None]:
        Masks(new)
    for masks in {grammar.masks for grammar in grammars}:
        members = [(i, seq) for i, seq in sequences if seq.grammar.masks is masks]
        indices = [seq.grammar.index for _, seq in members]
        ignores_end = [seq.params.ignore_eos for _, seq in members]
        words = masks.wait().to(logits.device, non_blocking=True)
        if indices != list(range(len(words))):  # some have ended since
            words = words.index_select(0, to_device(indices))
        is_banned = (words.view(torch.uint8).unsqueeze(2) & _bits(logits.device) == 0).flatten(1)[:, : logits.shape[1]]
        if any(ignores_end):
            ends = to_device(np.array(sorted(members[0][1].eos_token_ids), np.int64))  # the model's
            can_go_on = ~is_banned.index_fill(1, ends, True).all(1)
            is_banned[:, ends] |= (to_device(ignores_end) & can_go_on).unsqueeze(1)
        if len(members) == len(logits):
            logits.masked_fill_(is_banned, -torch.inf)
        else:
            rows = to_device([i for i, _ in members])
            logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_banned, -torch.inf))


@cache
def _bits(device: torch.device) -> Tensor:
    return (1 << torch.arange(8, device=device)).byte()
