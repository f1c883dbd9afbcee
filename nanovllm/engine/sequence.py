"""Sequence: one completion as the scheduler sees it. It knows token ids and counts, and no tensors."""

import inspect
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.outputs import FinishReason, Logprob, LogprobRow, candidates
from nanovllm.sampling_params import LogitsProcessor, SamplingParams
from nanovllm.text import CompletionText, Detokenizer

NO_GRAMMAR = "its structured outputs have a character that no token of the vocabulary begins, or are too complex"
NOT_DRAWN = "no token can be drawn from its logits, of which one is NaN or all are -inf"


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and one completion of a request, and how far the device has come with them.

    There is no prefill state and no decode state: `num_computed_tokens` has to catch up with the length.

    `num_pending` counts tokens that are planned or sampled and not yet committed: 0 or 1, and 2 between planning a step and
    committing the one before it. `num_admitted_tokens` counts the tokens that were known when the sequence was admitted. The
    CPU sends those; later ones are read on the device, where they were sampled. `row` is its place in the device's tables while
    it runs, and 0 while it waits. `ended` is where it is put when it is finished, or dropped by an exception: whoever waits for
    it takes it out.
    """

    request_id: int
    token_ids: "array[int]"  # prompt and completion, int32; it becomes NumPy's at once
    params: SamplingParams
    seed: int
    max_tokens: int  # params.max_tokens, or less where max_model_len comes first
    eos_token_ids: frozenset[int] = frozenset()
    prompt: str | None = None
    completion_text: CompletionText | None = None  # unless nobody asks for text
    prompt_detokenizer: Detokenizer | None = None  # the texts of its tokens, for their log-probabilities
    grammar: Any = None  # what its structured outputs may still become, see extras.structured_outputs

    num_prompt_tokens: int = field(init=False)
    needs_extras: bool = field(init=False)  # logit rules, truncation or log-probabilities
    has_lasting_rules: bool = field(init=False)  # logit rules beside a grammar that hold to its end
    stop_token_ids: frozenset[int] = field(init=False)
    allowed_token_ids: NDArray[np.int64] | None = field(init=False)
    processors: list[tuple[LogitsProcessor, bool]] = field(init=False)  # and whether it takes the prompt
    num_computed_tokens: int = 0
    num_admitted_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache held at the first admission
    num_shared_blocks: int = 0  # how many of its cached blocks others held when it was admitted
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of its leading full blocks
    prefix_ids: list[int] = field(default_factory=list)  # of the leading blocks that the prefix cache knows
    row: int = 0
    ended: dict["Sequence", None] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    cumulative_logprob: float = 0.0
    arrival_time: float = 0.0  # these three in seconds since the epoch
    first_token_time: float = 0.0
    finished_time: float = 0.0

    def __post_init__(self) -> None:
        p = self.params
        self.num_prompt_tokens = len(self.token_ids)
        self.stop_token_ids = frozenset(p.stop_token_ids or ())
        self.allowed_token_ids = np.array(p.allowed_token_ids) if p.allowed_token_ids else None
        self.processors = [(f, _takes_prompt(f)) for f in p.logits_processors or ()]
        self.has_lasting_rules = bool(p.is_penalized or p.logit_bias or p.allowed_token_ids or self.processors)
        self.needs_extras = self.has_logit_rules or p.is_truncated or p.logprobs is not None

    @property
    def has_logit_rules(self) -> bool:
        """Whether the logits of the next token are changed before temperature."""
        return self.grammar is not None or self.has_rules_beside_grammar

    @property
    def has_rules_beside_grammar(self) -> bool:
        return self.has_lasting_rules or self.num_completion_tokens < self.params.min_tokens

    @property
    def num_tokens(self) -> int:
        """Known tokens and the pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return list(self.token_ids[self.num_prompt_tokens :])

    @property
    def is_running(self) -> bool:
        return self.row > 0

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def reaches_length(self) -> bool:
        """Whether the pending token is the last one that the length allows, so that no more is to be planned."""
        return self.num_tokens - self.num_prompt_tokens >= self.max_tokens

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still to be read, for which its tokens must be computed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    @property
    def banned_token_ids(self) -> frozenset[int]:
        """Tokens that must not be drawn next: every stop token until `min_tokens` are there."""
        if self.num_completion_tokens >= self.params.min_tokens:
            return frozenset()
        return self.eos_token_ids | self.stop_token_ids

    def append(self, token_id: int | None, logprobs: LogprobRow | None, now: float) -> None:
        """Take the pending token and its log-probabilities, and find out whether it ends the completion.

        If no token could be drawn (None), an allowed one is appended in its place, and the completion ends.
        """
        is_drawn = token_id is not None
        if token_id is None:
            allowed = count() if self.allowed_token_ids is None else self.allowed_token_ids.tolist()
            token_id = next(t for t in allowed if t not in self.banned_token_ids)
            logprobs = logprobs and (math.nan, 0, *logprobs[2:])
        self.token_ids.append(token_id)
        self.num_pending -= 1
        if logprobs is not None:
            text_of = None if self.completion_text is None else self.completion_text.detokenizer.text_of
            self.logprobs.append(candidates(token_id, logprobs, self.params.logprobs, text_of))
            self.cumulative_logprob += logprobs[0]
        num_tokens = self.num_completion_tokens
        if num_tokens == 1:
            self.first_token_time = now
        may_stop = num_tokens > self.params.min_tokens
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if not is_drawn:
            reason, stop_reason = "abort", NOT_DRAWN
        elif self.grammar is not None and not self.grammar.is_valid:
            reason, stop_reason = "abort", NO_GRAMMAR
        elif may_stop and token_id in self.eos_token_ids and not self.params.ignore_eos:
            reason = "stop"
        elif may_stop and token_id in self.stop_token_ids:
            reason, stop_reason = "stop", token_id
        if self.completion_text is not None and (reason != "stop" or self.params.include_stop_str_in_output):
            stop = self.completion_text.append(token_id, may_stop and reason is None)
            if stop is not None:
                reason, stop_reason = "stop", stop
        if reason is None and self.grammar is not None and self.grammar.is_complete:
            reason = "stop"
        if reason is None and num_tokens >= self.max_tokens:
            reason = "length"
        if reason is not None:
            self.finish(reason, stop_reason, now)

    def append_prompt_logprobs(self, rows: Iterable[LogprobRow]) -> None:
        """Take the log-probabilities of the next tokens of the prompt."""
        for row in rows:
            token_id = self.token_ids[len(self.prompt_logprobs)]
            text_of = None if self.prompt_detokenizer is None else self.prompt_detokenizer.text_of
            self.prompt_logprobs.append(candidates(token_id, row, self.params.prompt_logprobs, text_of))
            if self.prompt_detokenizer is not None:
                self.prompt_detokenizer.add(token_id)

    def finish(self, reason: FinishReason, stop_reason: int | str | None, now: float) -> None:
        """End the completion, for one of the reasons of `CompletionOutput`."""
        self.finish_reason, self.stop_reason, self.finished_time = reason, stop_reason, now
        rest = self.completion_text.finish() if self.completion_text is not None else ""
        for token_id, found in zip(reversed(self.token_ids), reversed(self.logprobs), strict=False) if rest else ():
            if not found[token_id].decoded_token:  # the last token that waited for the end of its character
                found[token_id] = found[token_id]._replace(decoded_token=rest)
                break


def _takes_prompt(processor: LogitsProcessor) -> bool:
    """Whether a processor has three parameters that must be given: vLLM's way to ask for the prompt as well."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except ValueError:  # a builtin one has no signature
        return False
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters) == 3
