"""SamplingParams: its defaults, what it takes, and what it refuses by name and value."""

from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import numpy
import pytest

from nanovllm import SamplingParams

NAN, INF = float("nan"), float("inf")

WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, NAN, INF, 1e31, 1e39, 10**400, "1", True, None, 1j],
    "max_tokens": [0, -1, 1.5, 4.0, "4", True, None],
    "ignore_eos": [0, 1, "yes", None, numpy.True_],
    "top_k": [-2, 1.0, "5", True, None],
    "top_p": [0, 0.0, 1e-46, -0.1, 1.01, NAN, "0.9", True, None],
    "min_p": [-0.1, 1.01, NAN, "0.1", False, None],
    "seed": [2**63, -(2**63) - 1, 1.0, "a", True],
    "min_tokens": [-1, 1.0, "1", True, None],
    "stop_token_ids": ["12", 5, {1, 2}, [-1], [1, 2.0], [1, "2"], [True], [None]],
    "logprobs": [-2, 1.0, "1", True],
    "n": [0, -1, 1.0, "2", True, None],
    "repetition_penalty": [0, 0.0, -1.0, NAN, INF, "1", True, None],
    "presence_penalty": [-2.1, 2.1, NAN, "1", True, None],
    "frequency_penalty": [-2.1, 2.1, NAN, "1", True, None],
    "logit_bias": [5, [(1, 2.0)], {-1: 0.0}, {"1": 0.0}, {1: 100.5}, {1: NAN}, {1: "1"}, {1: True}],
    "allowed_token_ids": ["12", 5, {1, 2}, [], [-1], [1, 2.0], [True], [None]],
    "stop": [5, {"a"}, b"a", "", ["a", ""], ["a", 1], [None]],
    "include_stop_str_in_output": [0, "yes", None],
    "prompt_logprobs": [-2, 1.0, "1", True],
    "detokenize": [0, "yes", None],
    "skip_special_tokens": [0, "yes", None],
    "logits_processors": [max, "max", [max, 1], [None]],
}

EDGE_VALUES: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 1e-6, 100.0, 1e30, numpy.float32(0.5)],
    "max_tokens": [1, 2**40, numpy.int64(3)],
    "ignore_eos": [True, False],
    "top_k": [-1, 0, 1, 10**9, numpy.int32(5)],
    "top_p": [1e-9, 1, 1.0, numpy.float64(0.9)],
    "min_p": [0, 0.0, 1, 1.0, numpy.float16(0.5)],
    "seed": [None, -1, 0, 2**63 - 1, -(2**63), numpy.uint32(7)],
    "min_tokens": [0, 64, numpy.int16(2)],
    "stop_token_ids": [None, [], [0], (1, 2), range(3), [numpy.int64(4)]],
    "logprobs": [None, -1, 0, 5, numpy.int8(1)],
    "n": [1, 2, numpy.int64(3)],
    "repetition_penalty": [1e-9, 0.5, 1, 10.0],
    "presence_penalty": [-2, 0, 2.0, numpy.float32(0.5)],
    "frequency_penalty": [-2, 0, 2.0],
    "logit_bias": [None, {}, {0: -100}, {numpy.int64(7): 100.0}],
    "allowed_token_ids": [None, [0], (1, 2), range(3)],
    "stop": [None, "a", [], ["a", "b"], ("end",)],
    "include_stop_str_in_output": [True, False],
    "prompt_logprobs": [None, -1, 0, 5],
    "detokenize": [True, False],
    "skip_special_tokens": [True, False],
    "logits_processors": [None, [], [max], (min, max)],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize("table", [WRONG_VALUES, EDGE_VALUES])
def test_the_tables_below_cover_every_parameter(table: dict[str, list[Any]]) -> None:
    assert list(table) == [f.name for f in fields(SamplingParams)]


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_a_wrong_value_is_refused_with_the_parameters_name_and_the_value(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        SamplingParams(**{name: value})
    # Of a list or a dict, the error shows the entry.
    entries = [entry for item in value.items() for entry in item] if isinstance(value, dict) else [value]
    if isinstance(value, list) and value and name != "logit_bias":
        entries = value[-1:]
    assert str(refused.value).startswith(name)
    assert any(f"got {entry!r}" in str(refused.value) for entry in entries)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_tokens", "4", TypeError),
        ("max_tokens", 0, ValueError),
        ("top_p", None, TypeError),
        ("top_p", 0.0, ValueError),
        ("ignore_eos", 1, TypeError),
        ("n", 0, ValueError),
        ("stop", [1], TypeError),
        ("stop", "", ValueError),
        ("logit_bias", [1], TypeError),
        ("logit_bias", {1: 101}, ValueError),
        ("logits_processors", [1], TypeError),
        ("stop_token_ids", "12", TypeError),
        ("stop_token_ids", [-1], ValueError),
    ],
)
def test_a_wrong_type_is_a_type_error_and_a_wrong_value_a_value_error(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(EDGE_VALUES))
def test_the_edges_of_what_is_allowed_and_numpys_numbers_are_taken_as_they_are(name: str, value: Any) -> None:
    expected = value
    if name in ("stop_token_ids", "allowed_token_ids", "stop", "logits_processors") and value is not None:
        expected = (value,) if isinstance(value, str) else tuple(value)
    assert getattr(SamplingParams(**{name: value}), name) == expected


def test_the_callers_list_of_stop_tokens_may_change() -> None:
    stop_token_ids = [1, 2]
    params = SamplingParams(stop_token_ids=stop_token_ids)
    stop_token_ids.append(3)
    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(stop_token_ids=(1, 2)))


def test_a_wrong_stop_token_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids\[2\].*-7"):
        SamplingParams(stop_token_ids=[1, 2, -7])


def test_more_min_tokens_than_max_tokens_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"min_tokens .*max_tokens=4.* 5"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=4, min_tokens=4).min_tokens == 4


def test_an_integer_error_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SamplingParams(max_tokens=0)
    with pytest.raises(TypeError, match="an integer or None"):
        SamplingParams(seed="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(0\.0, 1\.0\]"):
        SamplingParams(top_p=0.0)


def test_the_defaults_are_nano_vllms_first_three_and_vllms_rest() -> None:
    assert asdict(SamplingParams()) == {
        "temperature": 1.0,
        "max_tokens": 64,
        "ignore_eos": False,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": None,
        "min_tokens": 0,
        "stop_token_ids": None,
        "logprobs": None,
        "n": 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "stop": None,
        "include_stop_str_in_output": False,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "logits_processors": None,
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 2, "temperature": 0}, "n must be 1 at temperature 0.* got 2"),
        ({"stop": "a", "detokenize": False}, r"stop must be None with detokenize=False, got \('a',\)"),
    ],
)
def test_what_cannot_go_together_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_the_callers_dict_of_biases_may_change() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 1.0
    assert params.logit_bias == {1: 2.0}


def test_the_first_three_are_positional_as_in_nano_vllm_and_the_rest_are_not() -> None:
    assert SamplingParams(0.6, 256, True) == SamplingParams(temperature=0.6, max_tokens=256, ignore_eos=True)
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.6, 256, True, 20)  # type: ignore[misc]


def test_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
def test_it_is_frozen(name: str) -> None:
    """One object may serve many requests, and was validated when it was made."""
    params = SamplingParams()
    with pytest.raises(FrozenInstanceError):
        setattr(params, name, 1)
