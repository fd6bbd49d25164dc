"""Combinations of several choices: the few that hold each pair of values, and all."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Combination = tuple[Any, ...]


def covering(*choices: Iterable[Any]) -> list[Combination]:
    """A few combinations in which each value of a choice meets each value of another one."""
    values = [list(choice) for choice in choices]
    places = list(product(*(range(len(choice)) for choice in values)))
    missing = set().union(*map(_pairs, places))
    chosen = []
    while missing:
        best = max(places, key=lambda place: len(missing & _pairs(place)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(choice[i] for choice, i in zip(values, place, strict=True)) for place in sorted(chosen)]


def pairwise(*choices: Iterable[Any]) -> list[Any]:
    """Sets of arguments for a test: all combinations, of which the few that hold each pair are not slow."""
    values = [list(choice) for choice in choices]
    few = covering(*values)
    return [pytest.param(*c, marks=() if c in few else pytest.mark.slow) for c in product(*values)]


def by_turns(some: Iterable[Any], others: Iterable[Any], every: int) -> list[Any]:
    """Sets of arguments for a test: all pairs. Of those of a value, one of ``every`` is not slow, in turn."""
    second = list(others)
    return [
        pytest.param(a, b, marks=() if i % every == j % every else pytest.mark.slow)
        for i, a in enumerate(some)
        for j, b in enumerate(second)
    ]


def _pairs(place: tuple[int, ...]) -> set[Combination]:
    return set(combinations(enumerate(place), 2))
