"""SamplingParams: what one request asks of sampling, stopping and its outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any

from nanovllm.checks import check_fields, check_float, check_int, check_list, check_positive, check_type

LogitsProcessor = Callable[..., Any]


def check_text(name: str, value: Any, also: str = "") -> str:
    if not check_type(name, value, str, also):
        raise ValueError(f"{name} must be a non-empty text, got {value!r}")
    return value


def check_biases(name: str, value: Any, also: str = "") -> dict[int, float]:
    check_type(name, value, Mapping, also)
    return {
        check_int(f"{name}, its token ids,", token_id, 0): check_float(f"{name}[{token_id}]", bias, -100.0, 100.0)
        for token_id, bias in value.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a completion: exactly one of these, by vLLM's names.

    Args:
        json: a JSON schema, or its text.
        regex: a regular expression, which the whole completion matches.
        choice: texts, of which the completion is one.
        grammar: a grammar in llguidance's dialect of Lark.
        json_object: True: a JSON object of any kind.
    """

    json: Annotated[str | Mapping[str, Any] | None, check_type, str | Mapping] = None
    regex: Annotated[str | None, check_text] = None
    choice: Annotated[Sequence[str] | None, check_list, check_text] = None
    grammar: Annotated[str | None, check_text] = None
    json_object: Annotated[bool | None, check_type, bool] = None

    def __post_init__(self) -> None:
        check_fields(self)
        forms = self.json, self.regex, self.choice or None, self.grammar, self.json_object or None
        if sum(form is not None for form in forms) != 1:
            raise ValueError(
                f"structured_outputs must have one of json, regex, choice, grammar and json_object, got {self}"
            )


@dataclass(slots=True)
class SamplingParams:
    """How the completions of one request are drawn. Names and meaning are vLLM's.

    It is checked when it is made, and again by a call that takes it, which keeps a copy: what is assigned afterwards changes
    nothing that runs. None for `temperature`, `top_k` and `top_p` is their default.

    The logits pass through penalties, bias and bans, processors, structured outputs, temperature, min-p, top-k and top-p in this
    order, each on what the one before kept; a token that ties with the last one kept is kept too.

    Args:
        temperature: divides the logits, at most 1e30; 0 is greedy (on a tie the lowest token id wins).
        max_tokens: a completion has at most so many tokens; None goes on up to the length of the model.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: the noise depends only on seed, position and token id, and not on the batch. In bfloat16 the last bits of the
            logits may depend on the batch. None or -1 takes a fresh one.
        min_tokens: nothing stops a completion before it has so many tokens.
        stop_token_ids: a completion ends with the first of these that is drawn.
        logprobs: report for every token the log-softmax of the raw logits, of the drawn token and of so many of
            the most likely ones; -1 is the whole vocabulary, True is 1, None reports nothing.
        n: draw so many completions of the prompt, whose KV they share; more than 1 needs a temperature.
        repetition_penalty: logits of tokens of the prompt and the completion so far are divided by this where they are
            positive, and multiplied where they are negative (Keskar et al., arXiv 1909.05858); above 0.
        presence_penalty: subtracted from the logits of tokens of the completion so far, in [-2, 2].
        frequency_penalty: the same for each time that the token is there, in [-2, 2].
        logit_bias: {token id: what is added to its logit, in [-100, 100]}.
        allowed_token_ids: no other token is drawn.
        stop: a text or several: a completion ends where the first of them appears, and is cut before it.
        include_stop_str_in_output: keep that text.
        prompt_logprobs: as `logprobs`, for the tokens of the prompt but the first.
        detokenize: give text; False leaves it empty, and needs no tokenizer.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: changes nothing: the text is what the tokenizer makes of the tokens.
        logits_processors: functions of (token ids of the completion so far, logits float32 [vocabulary] of the next one),
            or of (prompt's token ids, completion's, logits), that return the logits to draw from, in this order.
        bad_words: texts that the completion does not contain, nor their like after a space.
        structured_outputs: the completion has this form if it ends by itself, and begins so if it ends by length. It ends where its
            form allows nothing more, whatever `ignore_eos` and `min_tokens` say; with `ignore_eos` it ends nowhere else.

    Raises:
        TypeError, ValueError: on a value outside of what is said above.
    """

    temperature: Annotated[float, check_float, 0.0, 1e30] = 1.0  # times the noise it is finite
    max_tokens: Annotated[int | None, check_int, 1] = 64
    ignore_eos: bool = False
    _: KW_ONLY
    top_k: Annotated[int, check_int, -1] = 0
    top_p: Annotated[float, check_positive, 1.0] = 1.0
    min_p: Annotated[float, check_float, 0.0, 1.0] = 0.0
    seed: Annotated[int | None, check_int, -(2**63), 2**63 - 1] = None
    min_tokens: Annotated[int, check_int, 0] = 0
    stop_token_ids: Annotated[Sequence[int] | None, check_list, check_int, 0] = None
    logprobs: Annotated[int | None, check_int, -1] = None
    n: Annotated[int, check_int, 1] = 1
    repetition_penalty: Annotated[float, check_positive] = 1.0
    presence_penalty: Annotated[float, check_float, -2.0, 2.0] = 0.0
    frequency_penalty: Annotated[float, check_float, -2.0, 2.0] = 0.0
    logit_bias: Annotated[Mapping[int, float] | None, check_biases] = None
    allowed_token_ids: Annotated[Sequence[int] | None, check_list, check_int, 0] = None
    stop: Annotated[str | Sequence[str] | None, check_list, check_text] = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: Annotated[int | None, check_int, -1] = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: Annotated[Sequence[LogitsProcessor] | None, check_list, check_type, Callable] = None
    bad_words: Annotated[Sequence[str] | None, check_list, check_text] = None
    structured_outputs: Annotated[StructuredOutputsParams | None, check_type, StructuredOutputsParams] = None

    def __post_init__(self) -> None:
        self.temperature = 1.0 if self.temperature is None else self.temperature
        self.top_k = 0 if self.top_k is None else self.top_k
        self.top_p = 1.0 if self.top_p is None else self.top_p
        self.logprobs = 1 if self.logprobs is True else self.logprobs
        self.prompt_logprobs = 1 if self.prompt_logprobs is True else self.prompt_logprobs
        self.stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        check_fields(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, where all completions are equal, got {self.n}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop must be None with detokenize=False, got {self.stop!r}")
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids must have a token id or be None, got []")

    def clone(self) -> "SamplingParams":
        """A copy, checked."""
        return replace(self)

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def is_penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
