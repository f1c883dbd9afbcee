"""Prompts: everything that users may pass to generate(), made into one form and checked before anything runs."""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from numbers import Integral
from typing import Any, NamedTuple, TypedDict

import numpy as np

from nanovllm.checks import check_int, check_list, check_type
from nanovllm.sampling_params import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]
Prompts = Prompt | Sequence[Prompt]
NO_LISTS = bytes | bytearray | memoryview | Set | Mapping | Iterator  # they have integers too
Params = SamplingParams | Sequence[SamplingParams] | None  # one for all prompts, or one for each; None is the default


class TextPrompt(TypedDict):
    """vLLM's name for a prompt that is text."""

    prompt: str


class TokensPrompt(TypedDict):
    """vLLM's name for a prompt that is token ids."""

    prompt_token_ids: Sequence[int]


class Request(NamedTuple):
    """One prompt, with `token_ids` or with a `text` that is still to be tokenized, and how to complete it."""

    name: str  # what errors call it
    text: str | None
    token_ids: "array[int] | None"
    params: SamplingParams


def parse_requests(prompts: Prompts, params: Params) -> list[Request]:
    """The requests of one call, in order, with copies of their parameters; TypeError or ValueError name an invalid prompt."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence | dict) or isinstance(prompts, bytes | bytearray):
        raise TypeError(f"prompts must be text, token ids, a dict or a list of these, got {type(prompts).__name__}")
    is_one = isinstance(prompts, str | dict) or isinstance(next(iter(prompts), None), Integral)
    every: Any = [prompts] if is_one else prompts
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(every)
    params = check_list("sampling_params", params, check_type, SamplingParams, also=" or SamplingParams")
    if len(params) != len(every):
        raise ValueError(f"sampling_params has {len(params)} entries for {len(every)} prompts; one for each is needed")
    copies = {id(p): p.clone() for p in {id(p): p for p in params}.values()}
    return [_parse(f"prompts[{i}]", every[i], copies[id(params[i])]) for i in range(len(every))]


def check_request(name: str, token_ids: "array[int]", vocab_size: int, max_len: int) -> None:
    """Raise unless a model of this vocabulary and length can run the prompt."""
    if not token_ids:
        raise ValueError(f"{name} is empty: a prompt needs at least one token")
    ids = np.asarray(token_ids)
    for token_id in ids.min(), ids.max():
        check_int(f"token ids of {name}", int(token_id), 0, vocab_size - 1)
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


def _parse(name: str, prompt: Any, params: SamplingParams) -> Request:
    if not isinstance(prompt, dict):
        prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    if not prompt or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
        raise ValueError(f"{name} must have 'prompt', 'prompt_token_ids' or both, got {list(prompt)}")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str | None):
        raise TypeError(f"{name} must have text as its prompt, got {text!r}")
    if token_ids is None and text is not None:
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{name} must be text in Unicode, got half a surrogate pair in {text!r:.200}")
    else:
        try:
            if isinstance(token_ids, NO_LISTS):
                raise TypeError
            if hasattr(token_ids, "tolist"):  # NumPy's and PyTorch's
                token_ids = token_ids.tolist()
            array_of_ids = array("i", token_ids)
            # A bool is 0 or 1 in it: only then is every type looked at, which takes as long as the rest.
            if array_of_ids and np.asarray(array_of_ids).min() <= 1 and bool in map(type, token_ids):
                raise TypeError
            token_ids = array_of_ids
        except (TypeError, RuntimeError):  # RuntimeError: a tensor that has no values
            raise TypeError(f"{name} must be text or a list of token ids, got {token_ids!r:.200}") from None
        except OverflowError:
            large = (hex(i) for i in token_ids if isinstance(i, int) and not -(2**31) <= i < 2**31)
            raise ValueError(f"token ids of {name} must be below 2**31, got {next(large, '')[:40]}") from None
    return Request(name, text, token_ids, params)
