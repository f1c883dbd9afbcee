"""Sequence: one request as the scheduler sees it. It knows token ids and counts, no tensors and no text."""

from dataclasses import dataclass, field

from nanovllm.outputs import FinishReason, Logprob
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and completion of one request, and how far the device has come with it.

    There is no prefill state and no decode state: `num_computed_tokens` has to catch up with the length.

    `num_pending` counts tokens that are planned or sampled but not yet known on the CPU: at most one, and for a
    moment two, between planning a step and committing the one before it.
    `num_prefill_tokens` is the number of tokens known when the sequence was admitted, all of which the CPU sends;
    every later one is read on the device, where it was sampled. `row` is its place in the device's tables while
    it runs, and 0 while it waits.
    """

    seq_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int  # params.max_tokens, or less where max_model_len comes first
    eos_token_ids: frozenset[int] = frozenset()
    prompt: str | None = None

    num_prompt_tokens: int = field(init=False)
    is_plain: bool = field(init=False)  # the logits are drawn from as they are, and nothing else is asked for
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache held at the first admission
    block_table: list[int] = field(default_factory=list)
    prefix_ids: list[int] = field(default_factory=list)  # of the leading blocks that the prefix cache knows
    row: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.is_plain = (
            not self.params.is_truncated and not self.params.min_tokens and self.params.logprobs is None
        )

    @property
    def num_tokens(self) -> int:
        """Known tokens and the pending one."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def reaches_length(self) -> bool:
        """Whether the pending token is the last one that the length allows, so that no more is to be planned."""
        return self.num_tokens - self.num_prompt_tokens >= self.max_tokens

    @property
    def banned_token_ids(self) -> frozenset[int]:
        """Tokens that must not be drawn next: every stop token until `min_tokens` are there."""
        if self.num_completion_tokens >= self.params.min_tokens:
            return frozenset()
        return self.eos_token_ids.union(self.params.stop_token_ids or ())

    def append(self, token_id: int, candidates: dict[int, Logprob] | None = None) -> None:
        """Take the pending token and its log-probabilities, and find out whether it ends the completion."""
        self.token_ids.append(token_id)
        self.num_pending -= 1
        if candidates is not None:
            self.logprobs.append(candidates)
            self.cumulative_logprob += candidates[token_id].logprob
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif self.params.stop_token_ids and token_id in self.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif self.num_completion_tokens >= self.max_tokens:
            self.finish_reason = "length"
