"""The greedy bound: the paper's own derivative, which shows whether single steps are still too short."""

import math
from dataclasses import dataclass

from lightning_hd.checks import not_negative
from lightning_hd.rules.base import Context

_SHORTEST, _PART = 10, 0.02
"""The length of the memory: in looks at first, then as a part of the steps taken."""

_FEWEST = 4
"""The number of cosines below which their scatter is unknown."""


@dataclass
class Greedy:
    """The running mean of the paper's cosine, ``-g_t · (θ_t - θ_{t-1}) / (‖g_t‖ ‖θ_t - θ_{t-1}‖)``, and its error.

    For a convex loss it is positive only if the last step was too short to get to the minimum along its direction. A
    rule that looks at single steps is greedy: its rates are lower than the best ones. So rates at which single steps
    are still too short are lower than the best ones, too. Source: Section 3 of the paper; the bound is this project's.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = not_negative()  # the mean of the squared cosines
    weight: float = not_negative()  # the sum of the squared weights of the cosines in the mean

    def see(self, cosine: float, context: Context) -> None:
        """Add the cosine of a step that was looked at."""
        self.count += 1
        part = 1 / min(self.count, max(_SHORTEST, _PART * context.step / context.stride))
        self.mean += part * (cosine - self.mean)
        self.squares += part * (cosine**2 - self.squares)
        self.weight = (1 - part) ** 2 * self.weight + part**2

    @property
    def sigmas(self) -> float:
        """The mean over its standard error: above 2, steps are too short. It is 0 after a few cosines only."""
        if self.count < _FEWEST:
            return 0.0
        variance = max(self.squares - self.mean**2, (2.0**-23 * self.mean) ** 2)
        return self.mean / math.sqrt(variance * self.weight) if variance else 0.0
