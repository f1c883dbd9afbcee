"""Checks of what users pass in: every error names the parameter, the value and what is allowed.

A check returns the value as it is to be kept: numbers as Python's own, lists as tuples, which their owner cannot change.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np

# A device rounds what is less to 0, and what is more to infinity.
SMALLEST, LARGEST = (float(x) for x in (np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max))


def check_fields(options: Any) -> None:
    """Check a dataclass whose fields say what they take, and keep what the checks return.

    A field with a plain type takes its instances, and one with `Annotated[type, check, *limits]` what
    `check(name, value, *limits)` does not refuse; each takes its default as well, and None if its type says so.
    """
    kind: Any = type(options)
    for name, default, check, limits, also in _checks(kind):
        value = getattr(options, name)
        if value is not default and not (value is None and also):
            object.__setattr__(options, name, check(name, value, *limits, **also))


@cache
def _checks(kind: Any) -> list[tuple[str, Any, Any, list[Any], dict[str, str]]]:
    """Of each field of a dataclass its name, default and check, with the check's arguments."""
    found = []
    for f in fields(kind):
        check, *limits = getattr(f.type, "__metadata__", (check_type, f.type))
        takes_none = type(None) in get_args(getattr(f.type, "__origin__", None))
        found.append((f.name, f.default, check, limits, {"also": " or None"} if takes_none else {}))
    return found


def check_type(name: str, value: Any, kind: Any, also: str = "") -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {getattr(kind, '__name__', kind)}{also}, got {value!r}")
    return value


def check_int(name: str, value: Any, minimum: int, maximum: float = math.inf, also: str = "") -> int:
    """An integer in [minimum, maximum]; `also` says which other values the caller takes."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer:
        raise TypeError(f"{name} must be an integer{also}, got {value!r}")
    if not minimum <= value <= maximum:
        allowed = f"at least {minimum}" if maximum == math.inf else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be {allowed}{also}, got {value!r}")
    return int(value)


def check_float(name: str, value: Any, minimum: float, maximum: float = LARGEST, allowed: str = "") -> float:
    """A number in [minimum, maximum], which `allowed` may say in other words."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be {allowed or f'in [{minimum}, {maximum}]'}, got {value!r}")
    return float(value)


def check_positive(name: str, value: Any, maximum: float = LARGEST) -> float:
    return check_float(name, value, SMALLEST, maximum, f"above 0 and at most {maximum}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    if value not in tuple(choices):
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def check_list(name: str, value: Any, check: Any, *limits: Any, also: str = "") -> tuple[Any, ...]:
    """A list whose entries `check` takes."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list{also}, got {value!r}")
    return tuple(check(f"{name}[{i}]", entry, *limits) for i, entry in enumerate(value))
