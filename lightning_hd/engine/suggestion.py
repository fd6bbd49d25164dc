"""The constant rates that a run suggests for a training like this one without tuning."""

import math
from collections.abc import Sequence

import numpy as np

from lightning_hd.engine.rates import Rates

_FIRST = 0.5
"""The first part of the run counts. Later, rates fall when only noise is left, or rise as the loss vanishes."""

_QUANTILE = 0.8
"""This quantile of the rates is a high one, which the run has kept up for a while."""

_SAFETY = 0.6
"""This part of the quantile is suggested. A rate that varies may be too high at times; a constant one may not."""


def constant_rate(lrs: Sequence[float]) -> float | None:
    """The constant rate for a training of the same length; ``None`` if no step was taken.

    It is 0.6 times the 0.8-quantile of the rates in the first half of the run, but not below the lowest of them, so
    that a rate that never moved is suggested as it is. Source: this project.
    """
    first = lrs[: math.ceil(_FIRST * len(lrs))]
    return max(_SAFETY * float(np.quantile(first, _QUANTILE)), min(first)) if first else None


def suggestions(rates: Rates) -> list[float] | None:
    """A constant rate for each group, or its present one if it never moved; ``None`` if none did."""
    suggested = [constant_rate(trajectory.points) for trajectory in rates.trajectories]
    low, high = rates.limits
    found = []
    for group in rates.groups:
        own, lr = [rates.groups[i] for i in rates.members(group.scope)], suggested[group.scope]
        highest = max(abs(other.share) for other in own)
        base = max(abs(other.base) for other in own) or 1.0
        ratio = group.share / highest if highest else abs(group.base) / base
        frozen = group.share == 0 == group.base
        found.append(group.lr if lr is None or frozen else min(max(lr * ratio, low), high))
    return None if all(lr is None for lr in suggested) else found
