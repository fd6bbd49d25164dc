"""The cooldown of the rates at the end of a run whose length is known."""

import math
from dataclasses import dataclass


@dataclass
class Cooldown:
    """A cooldown over the last part of the run, by one minus the square root of the part of it that is over.

    It is steep at first, where the rate is high and its noise large, and long where the noise is small. Source: Hägele
    et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (NeurIPS 2024), Section 3.2.

    Args:
        part: The last part of the run, from 0 to 1.
        total: The number of steps; ``None``: it is not known, and rates do not fall.
        begin: How many of these steps former trainings have taken, from which this one learns.
    """

    part: float
    total: int | None
    begin: int = 0

    @property
    def length(self) -> float:
        """The length of the cooldown; 0 if there is none."""
        return self.part * (0 if self.total is None else self.total - self.begin)

    def begin_at(self, step: int) -> None:
        """Count the steps of this training from the end of another one, which took so many."""
        self.total = None if self.total is None else self.total + step - self.begin
        self.begin = step

    def is_over(self, step: int) -> bool:
        """Whether a step, counted from 1, comes after the last one of the cooldown."""
        return bool(self.part and self.total and step > self.total)

    def rest(self, step: int) -> float:
        """The number of steps from a step on, counted from 1; 0 if it is not known."""
        return max(0.0, (self.total or 0) - step + 1)

    def left(self, step: int) -> float:
        """The length of the cooldown that is still to come before a step, counted from 1; 0 if there is none."""
        return min(self.length, self.rest(step))

    def factor(self, step: int) -> float:
        """The factor of the rate in a step, counted from 1. It stays above 0, even in steps after the last one."""
        left = min(1.0, max((self.total or 0) - step + 1, 1) / self.length) if self.length else 1.0
        return 1 - math.sqrt(1 - left)
