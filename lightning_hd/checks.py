"""Checks of single values, which are arguments or saved numbers."""

import copy
import math
import operator
from collections.abc import Container, Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from torch import Tensor


def check_number(name: str, value: float, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """``value`` as a finite float from ``minimum`` to ``maximum``.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not finite, or out of range.
    """
    try:
        if isinstance(value, (bool, str, bytes, bytearray, Tensor)):
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
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    check_number(name, number)
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


def not_zero(default: float) -> Any:
    """A field of a dataclass that ``check_fields`` refuses at 0."""
    return field(default=default, metadata={"not_zero": True})


def save_fields(value: Any, without: Container[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, as plain values, for ``check_fields``."""
    return {own.name: copy.copy(getattr(value, own.name)) for own in fields(value) if own.name not in without}


def check_fields(cls: type[_Fields], saved: Mapping[str, Any], prefix: str = "", **others: Any) -> _Fields:
    """A dataclass of flags, counts, numbers and lists of numbers, from what was saved of it.

    A number may be infinite if its default is.

    Args:
        cls: The dataclass. Its annotations say what is allowed.
        saved: What was saved.
        prefix: What the names of the fields begin with in error messages.
        others: Fields that were not saved in this way.

    Raises:
        KeyError: A name is missing.
        TypeError: A value is of another type.
        ValueError: A value is out of range.
    """
    wanted = [own for own in fields(cls) if own.name not in others]  # type: ignore[arg-type]
    return cls(**{own.name: _check_field(own, prefix + own.name, saved[own.name]) for own in wanted}, **others)


def _check_field(own: "Field[Any]", name: str, value: Any) -> Any:
    minimum = own.metadata.get("minimum", -math.inf)
    if own.type == list[float]:
        return [check_number(name, item) for item in value]
    if own.type is bool:
        return check_flag(name, value)
    if isinstance(value, float) and value == own.default == math.inf:
        return math.inf
    number = check_count(name, value) if own.type is int else check_number(name, value, minimum)
    if own.metadata.get("not_zero") and not number:
        raise ValueError(f"{name} must not be 0")
    return number


def class_names(value: object) -> set[str]:
    """The names of a value's class and of its base classes, for classes that must not be imported, or exist twice."""
    return {base.__name__ for base in type(value).__mro__}
