"""The climb from the first rate: how fast it is, and how high it may lead."""

import math
from dataclasses import dataclass

from lightning_hd.checks import not_negative
from lightning_hd.rules.base import Observation

_FIRST_STEP = 1e-4
"""The length of the first step over the norm of the parameters."""

CAP, _CAREFUL_CAP = 0.5, 0.05
"""The largest change of ``log α`` per step: at the start, and once steps are long. They may do harm then, which must
have time to show. With 0.1, units of networks with clipped or normalized weights die under SGD, and the loss ends at
1.3 times as much. With 0.03, short runs lose."""

_HIGH, _LONG, _HIGHEST = 30.0, 0.006, 300.0
"""Steps are long once ``α`` was at the first multiple of ``α_1`` and a move had this part of ``‖θ‖``. Without regard to
moves, short runs with Adam lose, because its moves get shorter after the first one. With 0.02, Adam does lasting harm.
At the last multiple of ``α_1`` steps count as long in any case."""

_EARLY = 100.0
"""After so many steps the cap fades as ``1 / t``."""

_LONGEST = 1.0
"""The longest step over ``‖θ‖``. With 10, full batches blow up where the loss goes to 0."""


@dataclass
class Climb:
    """What bounds the rate from the start on: the first rate, the largest change per step, and the longest step.

    Where gradients shrink, ever higher rates seem right. An optimizer that divides by the scale of former gradients, as
    Adam does, takes full steps again as soon as that has shrunk, too. At such a rate they would be far longer than the
    parameters are. So a step of the length that the first direction had may not be longer than ``‖θ‖``. Source: this
    project.
    """

    first_lr: float = not_negative()  # α_1; 0 where it is the configured one
    direction: float = not_negative()  # ‖d_1‖; 0 where it is not known
    peak: float = not_negative()  # the highest α_t so far
    careful: bool = False  # whether steps are long

    def begin(self, param_norm: float, direction_norm: float) -> float:
        """``α_1 = 10^-4 ‖θ_1‖ / ‖d_1‖``; a norm of the parameters of 0 counts as 1."""
        self.direction, self.first_lr = direction_norm, _FIRST_STEP * (param_norm or 1.0) / direction_norm
        return self.first_lr

    def see(self, lr: float, seen: Observation) -> None:
        """Note the rate and the length of a move."""
        self.peak = max(self.peak, lr)
        long = self.peak >= _HIGH * self.first_lr and seen.move_norm >= _LONG * seen.param_norm
        self.careful |= long or self.peak >= _HIGHEST * self.first_lr

    def cap(self, step: int) -> float:
        """The largest change of ``log α`` per step."""
        return (_CAREFUL_CAP if self.careful else CAP) * min(1.0, _EARLY / step)

    def limit(self, seen: Observation, normalized: bool) -> float:
        """The highest rate. It is infinite where steps follow the norm of the gradient."""
        bounded = normalized and self.direction > 0 and seen.param_norm > 0
        return _LONGEST * seen.param_norm / self.direction if bounded else math.inf
