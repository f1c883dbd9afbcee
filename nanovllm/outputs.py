"""What generate() returns: vLLM's RequestOutput and CompletionOutput."""

from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position: its log-probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    `token_ids` holds every token drawn, the stop token included; `text` leaves out special tokens and the token
    that stopped it. `stop_reason` is the one of `stop_token_ids` that was drawn; it is None after an
    end-of-sequence token. `logprobs` has one dict for each token.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request. `output["text"]` and the like read the first completion, as nano-vllm's users write."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True

    def __getitem__(self, name: str) -> Any:
        if name not in CompletionOutput.__slots__:
            raise KeyError(name)
        return getattr(self.outputs[0], name)
