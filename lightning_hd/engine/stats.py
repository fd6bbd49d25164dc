"""Stats: the figures of a tuned optimizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Figures of the steps so far, for a log or a report.

    Attributes:
        backoffs: How often the rule of each scope has backed off from an overshoot. Each back-off is reported to the
            logger ``lightning_hd`` at the level INFO.
        nonfinite_steps: How many looks left the rate as it was, because a number was not finite.
        seconds: The time that tuning has taken on this process, in seconds.
        coordinates: How many coordinates a look sees, and how many there are.
        limits: The lower and the upper clamp on the rates. A clamp is infinite where there is none.
        loss: The mean loss of the steps between the last two looks, over the processes; ``None``: it is not known.
        writes: Before how many steps of this process others have written rates, without a schedule. Each of these
            became the new rate.
    """

    backoffs: tuple[int, ...]
    nonfinite_steps: int
    seconds: float
    coordinates: tuple[int, int]
    limits: tuple[float, float]
    loss: float | None
    writes: int
