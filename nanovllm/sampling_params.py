"""SamplingParams: what one request asks of sampling and stopping. Frozen, and validated when it is made."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from nanovllm.checks import check_bool, check_float, check_int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the completion of one request is drawn. Names, defaults and meaning are vLLM's.

    The logits pass through temperature, min-p, top-k and top-p in this order, each on what the one before kept;
    a token that ties with the last one kept is kept too.

    Args:
        temperature: divides the logits; 0 is greedy (on a tie the lowest token id wins).
        max_tokens: the completion has at most so many tokens.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: the same seed draws the same tokens whatever else is in the batch; None or -1 takes a fresh one.
        min_tokens: no stop token is drawn before the completion has so many tokens.
        stop_token_ids: the completion ends with the first of these that is drawn.
        logprobs: report for every token the log-softmax of the raw logits, of the drawn token and of so many of
            the most likely ones; -1 is the whole vocabulary, None reports nothing.

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

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0.0)
        check_int("max_tokens", self.max_tokens, 1)
        check_bool("ignore_eos", self.ignore_eos)
        check_int("top_k", self.top_k, -1)
        check_float("top_p", self.top_p, 0.0, 1.0, open_minimum=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1, also=" or None")
        check_int("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.stop_token_ids is not None:
            if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Sequence):
                raise TypeError(
                    f"stop_token_ids must be a list of token ids or None, got {self.stop_token_ids!r}"
                )
            for i, token_id in enumerate(self.stop_token_ids):
                check_int(f"stop_token_ids[{i}]", token_id, 0)
            object.__setattr__(
                self, "stop_token_ids", tuple(self.stop_token_ids)
            )  # the caller's list may change
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, -1, also=" or None")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
