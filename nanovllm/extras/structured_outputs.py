"""Structured outputs: completions that keep to a grammar, by llguidance, which says after each token what may follow."""

import json
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import StructuredOutputsParams

# As models like them: where spaces are free, some write spaces for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def new_matcher(
    params: StructuredOutputsParams, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]
) -> Any:
    """llguidance's matcher, of which each completion takes a copy.

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
        elif params.choice is not None:
            escaped = ("".join(f"\\x{{{ord(character):x}}}" for character in text) for text in params.choice)
            grammar = LLMatcher.grammar_from_regex("|".join(escaped))
        else:
            grammar = LLMatcher.grammar_from_lark(params.grammar)
        matcher = compiled(tokenizer, vocab_size, eos_token_ids, grammar)
    except (TypeError, ValueError) as error:
        raise ValueError(f"structured_outputs has {params}: {error}") from error
    if matcher.is_error():
        raise ValueError(f"structured_outputs has {params}: {matcher.get_error()}")
    return matcher


@lru_cache(maxsize=256)  # some take milliseconds
def compiled(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int], grammar: str) -> Any:
    from llguidance import LLMatcher

    return LLMatcher(guidance_tokenizer(tokenizer, vocab_size, eos_token_ids), grammar, log_level=0)


@lru_cache(maxsize=4)  # it takes a second
def guidance_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)


@cache
def executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def mask_logits(
    logits: Tensor, sequences: list[tuple[int, Sequence]], to_device: Callable[[ArrayLike], Tensor]
) -> None:
    """Set the logits of tokens that the sequences' grammars do not allow to -inf, in place. All masks are made in parallel."""
    num_words = -(-logits.shape[1] // 32)
    masks = np.zeros((len(sequences), num_words), np.uint32)
    matchers = [(seq.grammar, k) for k, (_, seq) in enumerate(sequences)]
    executor().unsafe_compute_mask_ptr(matchers, masks.ctypes.data, num_words * 4, len(sequences))
    for mask, (_, seq) in zip(masks, sequences, strict=True):
        if seq.params.ignore_eos:
            with_end = mask.copy()
            for token_id in seq.eos_token_ids:
                mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
            if not mask.any():  # it can only end
                mask[:] = with_end
    words = to_device(masks.view(np.int32)).unsqueeze(2)
    is_banned = (words >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1 == 0
    rows = to_device([i for i, _ in sequences])
    masked = logits.index_select(0, rows).masked_fill_(is_banned.flatten(1)[:, : logits.shape[1]], -torch.inf)
    logits.index_copy_(0, rows, masked)
