"""SamplingParams: its defaults, what it takes, and what it refuses by name and value."""

import re
from dataclasses import asdict

import numpy
import pytest

from nanovllm import SamplingParams, StructuredOutputsParams

NAN, INF = float("nan"), float("inf")

# Every parameter: nano-vllm's default of the first three and vLLM's of the rest, what is allowed (its edges, and numpy's
# numbers), and what is refused.
PARAMETERS = {
    "temperature": (
        1.0,
        [0, 0.0, 1, 1e-6, 100.0, 1e30, numpy.float32(0.5)],
        [-0.1, NAN, INF, 1e31, 1e39, 10**400, "1", True, 1j],
    ),
    "max_tokens": (64, [1, 2**40, numpy.int64(3), None], [0, -1, 1.5, 4.0, "4", True]),
    "ignore_eos": (False, [True], [0, 1, "yes", None, numpy.True_]),
    "top_k": (0, [-1, 1, 10**9, numpy.int32(5)], [-2, 1.0, "5", True]),
    "top_p": (1.0, [1e-9, 1, numpy.float64(0.9)], [0, 0.0, 1e-46, -0.1, 1.01, NAN, "0.9", True]),
    "min_p": (0.0, [0, 1, 1.0, numpy.float16(0.5)], [-0.1, 1.01, NAN, "0.1", False, None]),
    "seed": (None, [-1, 0, 2**63 - 1, -(2**63), numpy.uint32(7)], [2**63, -(2**63) - 1, 1.0, "a", True]),
    "min_tokens": (0, [64, numpy.int16(2)], [-1, 1.0, "1", True, None]),
    "stop_token_ids": (
        None,
        [[], [0], (1, 2), range(3), [numpy.int64(4)]],
        ["12", 5, {1, 2}, [-1], [1, 2.0], [1, "2"], [True], [None], [1, 2, -7]],
    ),
    "logprobs": (None, [-1, 0, 5, numpy.int8(1), True], [-2, 1.0, "1", False]),
    "n": (1, [2, numpy.int64(3)], [0, -1, 1.0, "2", True, None]),
    "repetition_penalty": (1.0, [1e-9, 0.5, 1, 10.0], [0, 0.0, -1.0, NAN, INF, "1", True, None]),
    "presence_penalty": (0.0, [-2, 0, 2.0, numpy.float32(0.5)], [-2.1, 2.1, NAN, "1", True, None]),
    "frequency_penalty": (0.0, [-2, 0, 2.0], [-2.1, 2.1, NAN, "1", True, None]),
    "logit_bias": (
        None,
        [{}, {0: -100}, {numpy.int64(7): 100.0}],
        [5, [(1, 2.0)], {-1: 0.0}, {"1": 0.0}, {1: 100.5}, {1: NAN}, {1: "1"}, {1: True}],
    ),
    "allowed_token_ids": (None, [[0], (1, 2), range(3)], ["12", 5, {1, 2}, [], [-1], [1, 2.0], [True], [None]]),
    "stop": (None, ["a", [], ["a", "b"], ("end",)], [5, {"a"}, b"a", "", ["a", ""], ["a", 1], [None]]),
    "include_stop_str_in_output": (False, [True], [0, "yes", None]),
    "prompt_logprobs": (None, [-1, 0, 5, True], [-2, 1.0, "1", False]),
    "detokenize": (True, [False], [0, "yes", None]),
    "skip_special_tokens": (True, [False], [0, "yes", None]),
    "spaces_between_special_tokens": (True, [False], [0, "yes", None]),
    "logits_processors": (None, [[], [max], (min, max)], [max, "max", [max, 1], [None]]),
    "bad_words": (None, [[], ["a", "b c"], ("x",)], ["a", 5, {"a"}, [""], ["a", 1], [None]]),
    "structured_outputs": (None, [StructuredOutputsParams(regex="a")], ["a", 5]),
}
ALLOWED = [(name, value) for name, (default, more, _) in PARAMETERS.items() for value in (default, *more)]
REFUSED = [(name, value) for name, (_, _, wrong) in PARAMETERS.items() for value in wrong]


def test_the_defaults_are_nano_vllms_first_three_and_vllms_rest():
    assert asdict(SamplingParams()) == {name: default for name, (default, _, _) in PARAMETERS.items()}


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=str)
def test_what_is_allowed_is_kept_and_lists_as_tuples(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    if name in ("stop_token_ids", "allowed_token_ids", "stop", "logits_processors", "bad_words") and value is not None:
        value = (value,) if isinstance(value, str) else tuple(value)
    assert kept == value


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_wrong_value_is_refused_with_the_parameters_name_and_the_value(name, value):
    """Of a list or a dict, the error shows the entry."""
    entries = value[-1:] if isinstance(value, list) and value and name != "logit_bias" else [value]
    if isinstance(value, dict):
        entries = [entry for item in value.items() for entry in item]
    shown = "|".join(re.escape(repr(entry)) for entry in entries)
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^{name}.*got ({shown})"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        # A wrong type is a TypeError, a wrong value a ValueError; each says what is allowed.
        ({"max_tokens": "4"}, TypeError, "an integer"),
        ({"max_tokens": 0}, ValueError, "at least 1"),
        ({"seed": "a"}, TypeError, "an integer or None"),
        ({"min_p": None}, TypeError, "a number"),
        ({"top_p": 0.0}, ValueError, r"must be above 0 and at most 1\.0, got 0\.0"),
        ({"ignore_eos": 1}, TypeError, "a bool"),
        ({"stop": [1]}, TypeError, "a str"),
        ({"stop": ""}, ValueError, "a non-empty text"),
        ({"logit_bias": [1]}, TypeError, "a Mapping or None"),
        ({"logit_bias": {1: 101}}, ValueError, r"\[-100\.0, 100\.0\]"),
        ({"logits_processors": [1]}, TypeError, "a Callable"),
        ({"stop_token_ids": "12"}, TypeError, "a list or None"),
        ({"stop_token_ids": [1, 2, -7]}, ValueError, r"stop_token_ids\[2\].*-7"),
        # What cannot go together.
        ({"max_tokens": 4, "min_tokens": 5}, ValueError, r"min_tokens .*max_tokens=4.* 5"),
        ({"n": 2, "temperature": 0}, ValueError, "n must be 1 at temperature 0.* got 2"),
        ({"stop": "a", "detokenize": False}, ValueError, r"stop must be None with detokenize=False, got \('a',\)"),
        ({"max_new_tokens": 5}, TypeError, "max_new_tokens"),
    ],
    ids=str,
)
def test_an_error_is_of_the_right_type_and_says_what_is_allowed(params, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**params)


def test_the_callers_list_and_dict_may_change():
    stop_token_ids, bias = [1, 2], {1: 2.0}
    params = SamplingParams(stop_token_ids=stop_token_ids, logit_bias=bias)
    stop_token_ids.append(3)
    bias[2] = 1.0
    assert (params.stop_token_ids, params.logit_bias) == ((1, 2), {1: 2.0})


def test_the_first_three_are_positional_as_in_nano_vllm_and_the_rest_are_not():
    assert SamplingParams(0.6, 256, True) == SamplingParams(temperature=0.6, max_tokens=256, ignore_eos=True)
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.6, 256, True, 20)


def test_none_is_the_default_of_the_four_that_vllm_takes_it_for():
    assert SamplingParams(temperature=None, top_p=None, top_k=None) == SamplingParams()


def test_what_is_assigned_is_checked_and_normalised_by_a_copy():
    params = SamplingParams(temperature=0, max_tokens=5)
    params.max_tokens, params.stop, params.logprobs = 7, "end", True
    copy = params.clone()
    assert (copy.max_tokens, copy.stop, copy.logprobs) == (7, ("end",), 1)
    copy.max_tokens = 9
    assert params.max_tokens == 7
    params.top_p = 3
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1.0, got 3"):
        params.clone()
    with pytest.raises(AttributeError):
        params.max_token = 1
