"""The schedules that rates are tuned under: a linear warm-up, then a cosine or the cooldown of the callback."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hd.engine.cooldown import Cooldown

WARM_UP = 0.05
"""The part of the steps over which a schedule rises."""
COOLDOWN = 0.2
"""The part over which the callback lets rates fall by default."""


def warm_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The usual schedule of experts: a linear warm-up, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))

    def factor(done: int) -> float:
        return (done + 1) / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (steps - warm))) / 2

    return LambdaLR(optimizer, factor)


def warm_cooldown(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A linear warm-up, a constant rate, and the callback's cooldown: the shape that the rule "auto" ends with."""
    warm, cooldown = max(1, round(WARM_UP * steps)), Cooldown(COOLDOWN, steps)
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warm) * cooldown.factor(done + 1))
