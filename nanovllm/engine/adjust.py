"""What requests change about their logits before temperature: penalties, then bias and bans, then processors."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import LogitsProcessor

Send = Callable[[ArrayLike], Tensor]  # to the device, without waiting
PENALIZED_AT_ONCE = 64  # rows, each of which takes a count for every token of the vocabulary


def adjust(logits: Tensor, sequences: list[Sequence], send: Send) -> Tensor:
    """A float32 copy of the logits [S, vocabulary] in which the rows of requests that ask for it are changed."""
    logits = logits.to(torch.float32, copy=True)
    asking = [(i, seq) for i, seq in enumerate(sequences) if seq.adjusts_logits and not seq.is_finished]
    penalized = [(i, seq) for i, seq in asking if seq.params.is_penalized]
    for start in range(0, len(penalized), PENALIZED_AT_ONCE):
        _penalize(logits, penalized[start : start + PENALIZED_AT_ONCE], send)
    _add_bias(logits, asking, send)
    _keep_allowed(logits, asking, send)
    for i, seq in asking:
        for processor in seq.params.logits_processors or ():
            logits[i] = _process(processor, seq, logits[i])
    return logits


def _penalize(logits: Tensor, penalized: list[tuple[int, Sequence]], send: Send) -> None:
    """Repetition (prompt and completion), presence and frequency (completion) penalties, on their rows in place."""
    rows = send([i for i, _ in penalized])
    histories = [seq.history for _, seq in penalized]
    lens = [len(history) for history in histories]
    in_completion = [
        np.arange(n) >= seq.num_prompt_tokens for n, (_, seq) in zip(lens, penalized, strict=True)
    ]
    shape = (len(penalized), logits.shape[1])
    place = send(np.repeat(np.arange(len(lens)) * shape[1], lens) + np.concatenate(histories))
    is_known = logits.new_zeros(shape, dtype=torch.bool)
    is_known.view(-1)[place] = True
    counts = logits.new_zeros(shape)
    counts.view(-1).scatter_add_(0, place, send(np.concatenate(in_completion).astype(np.float32)))
    params = [seq.params for _, seq in penalized]
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    repetition, presence, frequency = send(np.array(penalties, np.float32).T).unsqueeze(2)
    x = logits[rows]
    x = torch.where(is_known, torch.where(x > 0, x / repetition, x * repetition), x)
    logits[rows] = x - frequency * counts - presence * (counts > 0)


def _add_bias(logits: Tensor, asking: list[tuple[int, Sequence]], send: Send) -> None:
    """Add `logit_bias`, and -inf to the tokens that would stop too early, in place."""
    biases = [
        (i, token_id, bias) for i, seq in asking for token_id, bias in (seq.params.logit_bias or {}).items()
    ]
    biases += [(i, token_id, -np.inf) for i, seq in asking for token_id in seq.banned_token_ids]
    if biases:
        rows, token_ids, values = zip(*biases, strict=True)
        bias = send(np.array(values, np.float32))
        logits.index_put_((send(rows), send(token_ids)), bias, accumulate=True)


def _keep_allowed(logits: Tensor, asking: list[tuple[int, Sequence]], send: Send) -> None:
    """Where only some tokens are allowed, set all others to -inf, in place."""
    allowed = [(i, seq.params.allowed_token_ids) for i, seq in asking if seq.params.allowed_token_ids]
    if allowed:
        rows = send(np.repeat([i for i, _ in allowed], [len(ids) for _, ids in allowed]))
        places = rows, send(np.concatenate([ids for _, ids in allowed]))
        kept = logits[places]
        logits[send([i for i, _ in allowed])] = -torch.inf
        logits[places] = kept


def _process(processor: LogitsProcessor, seq: Sequence, logits: Tensor) -> Tensor:
    """Call a processor with two or with three arguments, whichever it takes."""
    arguments = [seq.completion_token_ids, logits]
    if len(inspect.signature(processor).parameters) == 3:
        arguments.insert(0, seq.token_ids[: seq.num_prompt_tokens])
    processed = processor(*arguments)
    if not isinstance(processed, Tensor) or processed.shape != logits.shape:
        raise TypeError(
            f"logits_processors: {processor!r} must return logits {list(logits.shape)}, got {processed!r}"
        )
    return processed
