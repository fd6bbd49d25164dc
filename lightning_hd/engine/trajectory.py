"""The course of a rate through the training, thinned out, and the constant rate that it suggests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_hd.checks import check_count, check_number

_POINTS = 256
"""The largest number of points. When it is exceeded, every second one is dropped, and half as many are added later."""

_FIRST = 0.5
"""The first part of the run counts. Later, rates fall when only noise is left, or rise as the loss vanishes."""

_QUANTILE = 0.8
"""This quantile of the rates is a high one, which the run has kept up for a while."""

_SAFETY = 0.6
"""This part of the quantile is suggested. A rate that varies may be too high at times; a constant one may not."""


@dataclass
class Trajectory:
    """The rates of the steps so far, one of every ``stride``."""

    points: list[float] = field(default_factory=list)
    stride: int = 1
    steps: int = 0

    def add(self, lr: float) -> None:
        """Add a step that was taken at this rate."""
        if self.steps % self.stride == 0:
            self.points.append(lr)
        self.steps += 1
        if len(self.points) > _POINTS:
            self.points = self.points[::2]
            self.stride *= 2

    def suggestion(self) -> float | None:
        """The constant rate for a training of the same length; ``None`` if no step was taken.

        It is 0.6 times the 0.8-quantile of the rates in the first half of the run. Source: this project.
        """
        if not self.points:
            return None
        first = self.points[: math.ceil(_FIRST * len(self.points))]
        return _SAFETY * float(np.quantile(first, _QUANTILE))

    def state_dict(self) -> dict[str, Any]:
        """The points, the stride and the number of steps."""
        return {"points": list(self.points), "stride": self.stride, "steps": self.steps}

    @staticmethod
    def loaded(saved: dict[str, Any]) -> "Trajectory":
        """A trajectory from what ``state_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        points: Sequence[Any] = saved["points"]
        numbers = [check_number("points", lr) for lr in points]
        return Trajectory(numbers, max(check_count("stride", saved["stride"]), 1), check_count("steps", saved["steps"]))
