"""A rate's way through the training, thinned out, and the constant rate that it suggests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_hd.checks import check_count, check_number

_POINTS = 256
"""At most so many points are kept: then every second one is dropped, and from there half as many come in."""

_MIDDLE = (0.2, 0.8)
"""The part of the run that counts: after the climb, and before the rates decline."""

_QUANTILE = 0.25
"""Which of the rates is suggested. What is too high costs more than what is too low by the same factor."""


@dataclass
class Trajectory:
    """The rates of the steps so far, one of every ``stride``."""

    points: list[float] = field(default_factory=list)
    stride: int = 1
    steps: int = 0

    def add(self, lr: float) -> None:
        """A step was taken at this rate."""
        if self.steps % self.stride == 0:
            self.points.append(lr)
        self.steps += 1
        if len(self.points) > _POINTS:
            self.points = self.points[::2]
            self.stride *= 2

    def suggestion(self) -> float | None:
        """The constant rate for a training of the same length; ``None``: no step was taken.

        It is the lower quartile of the rates in the middle of the run. The source is this project.
        """
        if not self.points:
            return None
        first, last = (round(part * (len(self.points) - 1)) for part in _MIDDLE)
        return float(np.quantile(self.points[first : last + 1], _QUANTILE))

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"points": list(self.points), "stride": self.stride, "steps": self.steps}

    @staticmethod
    def loaded(saved: dict[str, Any]) -> "Trajectory":
        """What :meth:`state_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
        """
        points: Sequence[Any] = saved["points"]
        numbers = [check_number("points", lr) for lr in points]
        return Trajectory(numbers, max(check_count("stride", saved["stride"]), 1), check_count("steps", saved["steps"]))
