"""What comes out: vLLM's RequestOutput and CompletionOutput, and the increments of a stream."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, repeat
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]

# A token's log-probability and rank, and those of the most likely tokens with their ids: see extras.logprobs.logprobs.
LogprobRow = tuple[float, int, list[float], list[int]]


class Logprob(NamedTuple):
    """One candidate at one position: its log-probability, its rank (1 is the most likely) and its text.

    Of a token outside of the most likely ones that were asked for, `rank` is the number of tokens at least as likely.
    `decoded_token` is what the token adds to the text before it: nothing if it ends within a character, the character if it
    completes one. Joined, those of the drawn tokens are the text with the special tokens that are left out there. None
    without detokenization.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


def candidates(
    token_id: int, row: LogprobRow, num_top: int | None, text_of: Callable[[int], str] | None
) -> dict[int, Logprob]:
    """A token and the `num_top` most likely ones in its place (-1 is all that are there), with their texts."""
    logprob, rank, values, ids = row
    ids = ids if num_top == -1 else ids[:num_top]
    texts = map(text_of, [token_id, *ids]) if text_of else repeat(None, len(ids) + 1)
    found = {token_id: Logprob(logprob, rank, next(texts))}
    found.update(zip(ids, map(Logprob, values, count(1), texts), strict=True))
    return found


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    `token_ids` holds every token drawn, the stop token included; `text` leaves out special tokens and what stopped it,
    unless the request wants them. `stop_reason` is the stop string, or the one of `stop_token_ids`, that stopped it; it is
    None after an end-of-sequence token. `logprobs` has one dict for each token.

    `finish_reason` is "abort" where a request was dropped, and where no token could be drawn from its logits (NaN, or -inf
    alone), as `stop_reason` then says. The last token is then one that was allowed, in place of one that was drawn.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class Increment(CompletionOutput):
    """What a step added to a completion in a stream: the text and the tokens that are new. The last one of a completion
    has its `finish_reason`. `text` never ends within a character, but where the completion does; it may be empty."""

    prompt_index: int = 0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When a request was queued, had its first token (0.0 without one), and was finished: seconds since the epoch."""

    arrival_time: float
    first_token_time: float
    finished_time: float


@dataclass(slots=True)
class RequestOutput(Mapping[str, Any]):
    """A finished request. As a mapping it is its first completion: `output["text"]`, as nano-vllm's users write.

    `prompt_logprobs` has None for the first token of the prompt, then a dict for each.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    metrics: RequestMetrics
    finished: bool = True

    def __getitem__(self, name: str) -> Any:
        if name not in CompletionOutput.__slots__:
            raise KeyError(name)
        return getattr(self.outputs[0], name)

    def __iter__(self) -> Iterator[str]:
        return iter(CompletionOutput.__slots__)

    def __len__(self) -> int:
        return len(CompletionOutput.__slots__)
