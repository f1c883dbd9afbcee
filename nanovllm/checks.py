"""Checks of what users pass in: every error names the parameter, the value and what is allowed."""

import ctypes
import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None, also: str = "") -> None:
    """Raise unless `value` is an integer in [minimum, maximum]; `also` says which other values the caller takes."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer:
        raise TypeError(f"{name} must be an integer{also}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be {allowed}{also}, got {value!r}")


def check_float(
    name: str, value: Any, minimum: float, maximum: float = math.inf, open_minimum: bool = False
) -> None:
    """Raise unless `value` is a finite number in [minimum, maximum], or (minimum, maximum] if `open_minimum`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        single = ctypes.c_float(float(value)).value  # what the device will see
    except OverflowError:
        single = math.inf
    too_low = single <= minimum if open_minimum else value < minimum
    if not math.isfinite(single) or too_low or value > maximum:
        bracket = "(" if open_minimum else "["
        upper = "infinity)" if maximum == math.inf else f"{maximum}]"
        raise ValueError(f"{name} must be in {bracket}{minimum}, {upper}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_list(name: str, value: Any, kind: str) -> tuple[Any, ...]:
    """The entries of a list of `kind`: "token ids", "non-empty texts" or "functions"."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of {kind} or None, got {value!r}")
    for i, entry in enumerate(value):
        if kind == "token ids":
            check_int(f"{name}[{i}]", entry, 0)
        elif kind == "functions":
            if not callable(entry):
                raise TypeError(f"{name}[{i}] must be a function, got {entry!r}")
        elif not isinstance(entry, str):
            raise TypeError(f"{name}[{i}] must be a text, got {entry!r}")
        elif not entry:
            raise ValueError(f"{name}[{i}] must be a non-empty text, got {entry!r}")
    return tuple(map(int, value)) if kind == "token ids" else tuple(value)
