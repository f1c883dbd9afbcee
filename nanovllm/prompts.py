"""Prompts: everything that users may pass to generate(), made into one form and checked before anything runs."""

from array import array
from collections.abc import Sequence as Seq
from numbers import Integral
from typing import Any, NamedTuple

from nanovllm.checks import check_int
from nanovllm.sampling_params import SamplingParams

Prompt = str | Seq[int] | dict[str, Any]


class Request(NamedTuple):
    """One prompt, with `token_ids` or with a `text` that is still to be tokenized, and how to complete it."""

    name: str  # what errors call it
    text: str | None
    token_ids: list[int] | None
    params: SamplingParams


def parse_requests(
    prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None
) -> list[Request]:
    """The requests of one call, in order; TypeError or ValueError name the prompt that is none."""
    every = _as_list(prompts)
    pairs = zip(every, _as_params(sampling_params, len(every)), strict=True)
    return [_parse(f"prompts[{i}]", prompt, params) for i, (prompt, params) in enumerate(pairs)]


def check_request(name: str, token_ids: list[int], vocab_size: int, max_len: int) -> None:
    """Raise unless a model of this vocabulary and length can run the prompt."""
    if not token_ids:
        raise ValueError(f"{name} is empty: a prompt needs at least one token")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
        raise ValueError(f"{name} has token id {wrong}; the vocabulary is [0, {vocab_size})")
    if len(token_ids) >= max_len:
        raise ValueError(f"{name} has {len(token_ids)} tokens; max_model_len={max_len} leaves no room for more")


def check_params(name: str, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    """Raise unless a model of this vocabulary can do what is asked for the prompt called `name`."""
    for option in "stop_token_ids", "allowed_token_ids", "logit_bias":
        for token_id in getattr(params, option) or ():
            check_int(f"{option} of {name}", token_id, 0, vocab_size - 1)
    for option in "logprobs", "prompt_logprobs":
        if getattr(params, option) is not None:
            check_int(f"{option} of {name}", getattr(params, option), -1, vocab_size)
    stop_token_ids = eos_token_ids.union(params.stop_token_ids or ())
    if params.min_tokens and stop_token_ids.issuperset(params.allowed_token_ids or range(vocab_size)):
        raise ValueError(
            f"min_tokens of {name} must be 0 where every token that is allowed is a stop token, got {params.min_tokens}"
        )


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, Seq) or isinstance(prompts, bytes | bytearray):
        raise TypeError(f"prompts must be text, token ids, a dict or a list of these, got {type(prompts).__name__}")
    is_one = len(prompts) > 0 and isinstance(prompts[0], Integral)
    return [prompts] if is_one else list(prompts)


def _as_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Seq) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {params!r}")
    if len(params) != num_prompts:
        raise ValueError(f"sampling_params has {len(params)} entries for {num_prompts} prompts; one for each is needed")
    return list(params)


def _parse(name: str, prompt: Any, params: SamplingParams) -> Request:
    if not isinstance(prompt, dict):
        prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    if not prompt or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
        raise ValueError(f"{name} must have 'prompt', 'prompt_token_ids' or both, got {list(prompt)}")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str | None):
        raise TypeError(f"{name} must have text as its prompt, got {text!r}")
    if token_ids is None and text is not None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which no tokenizer takes
            raise ValueError(f"{name} must be text in Unicode, got {text!r:.200}: {error}") from None
    else:
        try:
            token_ids = array("q", iter(token_ids)).tolist()  # takes every kind of integer, and nothing else
        except (TypeError, OverflowError):
            raise TypeError(f"{name} must be text or a list of token ids, got {token_ids!r:.200}") from None
    return Request(name, text, token_ids, params)
