"""SamplingParams: its defaults, what it takes, and what it refuses by name and value."""

from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import numpy
import pytest

from nanovllm import SamplingParams

NAN, INF = float("nan"), float("inf")

WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, NAN, INF, "1", True, None, 1j],
    "max_tokens": [0, -1, 1.5, 4.0, "4", True, None],
    "ignore_eos": [0, 1, "yes", None, numpy.True_],
    "top_k": [-2, 1.0, "5", True, None],
    "top_p": [0, 0.0, -0.1, 1.01, NAN, "0.9", True, None],
    "min_p": [-0.1, 1.01, NAN, "0.1", False, None],
    "seed": [2**63, -(2**63) - 1, 1.0, "a", True],
    "min_tokens": [-1, 1.0, "1", True, None],
    "stop_token_ids": ["12", 5, {1, 2}, [-1], [1, 2.0], [1, "2"], [True], [None]],
    "logprobs": [-2, 1.0, "1", True],
}

EDGE_VALUES: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 1e-6, 100.0, numpy.float32(0.5)],
    "max_tokens": [1, 2**40, numpy.int64(3)],
    "ignore_eos": [True, False],
    "top_k": [-1, 0, 1, 10**9, numpy.int32(5)],
    "top_p": [1e-9, 1, 1.0, numpy.float64(0.9)],
    "min_p": [0, 0.0, 1, 1.0, numpy.float16(0.5)],
    "seed": [None, -1, 0, 2**63 - 1, -(2**63), numpy.uint32(7)],
    "min_tokens": [0, 64, numpy.int16(2)],
    "stop_token_ids": [None, [], [0], (1, 2), range(3), [numpy.int64(4)]],
    "logprobs": [None, -1, 0, 5, numpy.int8(1)],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value!r}")
        for name, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize("table", [WRONG_VALUES, EDGE_VALUES])
def test_the_tables_below_cover_every_parameter(table: dict[str, list[Any]]) -> None:
    assert list(table) == [f.name for f in fields(SamplingParams)]


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_a_wrong_value_is_refused_with_the_parameters_name_and_the_value(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        SamplingParams(**{name: value})
    wrong = value[-1] if isinstance(value, list) else value  # of a list, the error shows the entry
    assert str(refused.value).startswith(name)
    assert repr(wrong) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_tokens", "4", TypeError),
        ("max_tokens", 0, ValueError),
        ("top_p", None, TypeError),
        ("top_p", 0.0, ValueError),
        ("ignore_eos", 1, TypeError),
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
    expected = tuple(value) if name == "stop_token_ids" and value is not None else value
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
    }


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
