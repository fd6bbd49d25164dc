"""Checks of single values, which are arguments or saved numbers."""

import math
import operator
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, SupportsIndex, TypeVar

from torch import Tensor


def check_number(name: str, value: float, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """``value`` as a finite float from ``minimum`` to ``maximum``.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not finite, or out of range.
    """
    try:
        if isinstance(value, (bool, str, Tensor)):
            raise TypeError
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large a number") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or not minimum <= number <= maximum:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        bound += "" if maximum == math.inf else f" and at most {maximum:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def check_count(name: str, value: int) -> int:
    """``value`` as a whole number of at least 0.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is negative.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or isinstance(value, Tensor):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return number


def check_divisor(name: str, value: float) -> float:
    """``value`` as a finite number that is not 0; raises ``TypeError`` or ``ValueError`` otherwise."""
    number = check_number(name, value)
    if not number:
        raise ValueError(f"{name} must not be 0")
    return number


def check_flag(name: str, value: bool) -> bool:
    """``value`` if it is ``True`` or ``False``; raises ``TypeError`` otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


_Fields = TypeVar("_Fields")


def not_negative(default: float = 0.0) -> Any:
    """A field of a dataclass that ``check_fields`` refuses below 0."""
    return field(default=default, metadata={"minimum": 0.0})


def check_fields(cls: type[_Fields], saved: Mapping[str, Any], prefix: str = "") -> _Fields:
    """A dataclass of flags, counts and numbers, from what was saved of it under names with a prefix.

    A number may be infinite if its default is.

    Raises:
        KeyError: A name is missing.
        TypeError: A value is of another type.
        ValueError: A value is out of range.
    """
    found: dict[str, Any] = {}
    for own in fields(cls):  # type: ignore[arg-type]
        name = prefix + own.name
        value = saved[name]
        if own.type is bool:
            found[own.name] = check_flag(name, value)
        elif own.type is int:
            found[own.name] = check_count(name, value)
        elif own.default == math.inf and value == math.inf:
            found[own.name] = math.inf
        else:
            found[own.name] = check_number(name, value, own.metadata.get("minimum", -math.inf))
    return cls(**found)
