"""What requests change about their logits before temperature: penalties, then bias and bans, processors, and grammars."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm.engine.sequence import Sequence

ToDevice = Callable[[ArrayLike], Tensor]  # which does not wait
Indexed = list[tuple[int, Sequence]]  # sequences, and which of the logits are theirs


def apply_rules(logits: Tensor, sequences: Indexed, to_device: ToDevice) -> Tensor:
    """A copy of the logits [S, vocabulary] in which those of `sequences` are changed by their rules: in float32, unless all that they
    have is grammars, which only ban."""
    with_rules = [(i, seq) for i, seq in sequences if seq.has_rules_beside_grammar]
    logits = logits.to(torch.float32 if with_rules else logits.dtype, copy=True)
    _penalize(logits, with_rules, to_device)
    _add_bias(logits, with_rules, to_device)
    _keep_allowed(logits, with_rules, to_device)
    for i, seq in with_rules:
        for processor, takes_prompt in seq.processors:
            prompt = [list(seq.token_ids[: seq.num_prompt_tokens])] if takes_prompt else []
            row = processor(*prompt, seq.completion_token_ids, logits[i])
            if not isinstance(row, Tensor) or row.shape != logits[i].shape:
                shape = list(logits[i].shape)
                raise TypeError(f"logits_processors: {processor!r} must return logits {shape}, got {row!r}")
            logits[i] = row
    if with_grammars := [(i, seq) for i, seq in sequences if seq.grammar is not None]:
        from nanovllm.extras.structured_outputs import mask_logits

        mask_logits(logits, with_grammars, to_device)
    return logits


def _penalize(logits: Tensor, sequences: Indexed, to_device: ToDevice) -> None:
    """Repetition (prompt and completion), presence and frequency (completion) penalties, in place.

    They change the logits of known tokens only; one that stands in a sequence twice is computed twice, to the same result.
    """
    penalized = [(i, seq) for i, seq in sequences if seq.params.is_penalized]
    if not penalized:
        return
    token_ids = to_device(np.concatenate([seq.token_ids for _, seq in penalized]))
    lens = [n for _, seq in penalized for n in (seq.num_prompt_tokens, seq.num_completion_tokens)]
    parts = torch.repeat_interleave(to_device(lens), output_size=len(token_ids))  # prompts are even, completions odd
    owner, is_drawn = parts // 2, parts % 2
    params = (seq.params for _, seq in penalized)
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    repetition, presence, frequency = to_device(np.array(penalties, np.float32))[owner].unbind(1)
    vocab_size = logits.shape[1]
    places = owner * vocab_size + token_ids
    counts = logits.new_zeros(len(penalized) * vocab_size).index_add_(0, places, is_drawn.float())[places]
    known = to_device([i for i, _ in penalized])[owner] * vocab_size + token_ids
    x = logits.view(-1)[known]
    x = torch.where(x > 0, x / repetition, x * repetition)
    logits.view(-1).index_copy_(0, known, x - frequency * counts - presence * (counts > 0))


def _add_bias(logits: Tensor, sequences: Indexed, to_device: ToDevice) -> None:
    """Add `logit_bias`, and -inf to the tokens that would stop too early, in place."""
    start = logits.shape[1]
    biases = [(i * start + t, b) for i, seq in sequences for t, b in (seq.params.logit_bias or {}).items()]
    biases += [(i * start + t, -np.inf) for i, seq in sequences for t in seq.banned_token_ids]
    if biases:
        places, values = zip(*biases, strict=True)
        logits.view(-1).scatter_add_(0, to_device(places), to_device(np.array(values, np.float32)))


def _keep_allowed(logits: Tensor, sequences: Indexed, to_device: ToDevice) -> None:
    """Where only some tokens are allowed, set all others to -inf, in place."""
    allowed = [(i, seq.allowed_token_ids) for i, seq in sequences if seq.allowed_token_ids is not None]
    if allowed:
        places = to_device(np.concatenate([i * logits.shape[1] + token_ids for i, token_ids in allowed]))
        kept = logits.view(-1).index_select(0, places)
        logits.index_fill_(0, to_device([i for i, _ in allowed]), -torch.inf)
        logits.view(-1).index_copy_(0, places, kept)
