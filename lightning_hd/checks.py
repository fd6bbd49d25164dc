"""Checks of single values, which are arguments or saved numbers."""

import math
import operator
from typing import SupportsIndex

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
