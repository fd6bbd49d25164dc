"""The decline of the rates at the end of a run whose length is known."""

from dataclasses import dataclass


@dataclass
class Decline:
    """A linear decline: over the last part of the run, rates are proportional to the number of steps that are left.

    Args:
        part: The last part of the run, from 0 to 1.
        total: The number of steps; ``None``: it is not known, and rates do not fall.
    """

    part: float
    total: int | None

    def is_over(self, step: int) -> bool:
        """Whether a step, counted from 1, comes after the last one of the decline."""
        return bool(self.part and self.total and step > self.total)

    def factor(self, step: int) -> float:
        """The factor of the rate in a step, counted from 1. It stays above 0, even in steps after the last one."""
        length = self.part * (self.total or 0)
        return min(1.0, max((self.total or 0) - step + 1, 1) / length) if length else 1.0
