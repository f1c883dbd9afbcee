"""SamplingParams: what one request asks of sampling, stopping and its outputs. Frozen, and validated when it is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from nanovllm.checks import check_bool, check_float, check_int, check_list

LogitsProcessor = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the completions of one request are drawn. Names and meaning are vLLM's.

    The logits pass through penalties, bias and bans, processors, temperature, min-p, top-k and top-p in this order, each
    on what the one before kept; a token that ties with the last one kept is kept too.

    Args:
        temperature: divides the logits; 0 is greedy (on a tie the lowest token id wins).
        max_tokens: a completion has at most so many tokens.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: the same seed draws the same tokens whatever else is in the batch; None or -1 takes a fresh one.
        min_tokens: nothing stops a completion before it has so many tokens.
        stop_token_ids: a completion ends with the first of these that is drawn.
        logprobs: report for every token the log-softmax of the raw logits, of the drawn token and of so many of
            the most likely ones; -1 is the whole vocabulary, None reports nothing.
        n: draw so many completions of the prompt, whose KV they share; more than 1 needs a temperature.
        repetition_penalty: logits of tokens of the prompt and the completion so far are divided by this where they are
            positive, and multiplied where they are negative (Keskar et al., arXiv 1909.05858); above 0.
        presence_penalty: subtracted from the logits of tokens of the completion so far, in [-2, 2].
        frequency_penalty: the same for each time that the token is there, in [-2, 2].
        logit_bias: {token id: what is added to its logit, in [-100, 100]}.
        allowed_token_ids: no other token is drawn.
        stop: a text or several: a completion ends where one of them appears first, and is cut before it.
        include_stop_str_in_output: it is cut after it.
        prompt_logprobs: as `logprobs`, for the tokens of the prompt but the first.
        detokenize: give text; False leaves it empty, and needs no tokenizer.
        skip_special_tokens: leave special tokens out of the text.
        logits_processors: functions of (token ids of the completion so far, logits float32 [vocabulary] of the next one),
            or of (prompt's token ids, completion's, logits), that return the logits to draw from, in this order.

    Raises:
        TypeError, ValueError: on a value outside of what is said above.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    _: KW_ONLY
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logits_processors: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0.0)
        check_float("top_p", self.top_p, 0.0, 1.0, open_minimum=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, open_minimum=True)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name, minimum in ("max_tokens", 1), ("top_k", -1), ("min_tokens", 0), ("n", 1):
            check_int(name, getattr(self, name), minimum)
        for name in "logprobs", "prompt_logprobs":
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), -1, also=" or None")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1, also=" or None")
        for name in "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens":
            check_bool(name, getattr(self, name))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind in (
            ("stop_token_ids", "token ids"),
            ("allowed_token_ids", "token ids"),
            ("stop", "non-empty texts"),
            ("logits_processors", "functions"),
        ):
            if getattr(self, name) is not None:  # a tuple, since the caller's list may change
                object.__setattr__(self, name, check_list(name, getattr(self, name), kind))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict or None, got {self.logit_bias!r}")
            for token_id, bias in self.logit_bias.items():
                check_int("logit_bias, its token ids,", token_id, 0)
                check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
            bias_of = {int(token_id): float(bias) for token_id, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias_of)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, where all completions are equal, got {self.n}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop must be None with detokenize=False, got {self.stop!r}")
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids must have a token id or be None, got []")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def is_penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
