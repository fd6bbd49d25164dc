"""The schedules that rates are tuned under: a linear warm-up, then a cosine or the cooldown of the callback."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hd.engine.arguments import make_cooldown
from lightning_hd.rules import Auto

WARM_UP = 0.05
"""The part of the steps over which a schedule rises."""


def warmed_up(optimizer: Optimizer, steps: int, after: Callable[[int, int], float]) -> LambdaLR:
    """A linear warm-up, then the factor after so many steps, the first of which are the warm-up."""
    warm = max(1, round(WARM_UP * steps))
    return LambdaLR(optimizer, lambda done: (done + 1) / warm if done < warm else after(done, warm))


def warm_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The usual schedule of experts: a cosine to 0 after the warm-up."""
    return warmed_up(optimizer, steps, lambda done, warm: (1 + math.cos(math.pi * (done - warm) / (steps - warm))) / 2)


def warm_cooldown(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A constant rate after the warm-up, and the callback's own cooldown: the shape that the rule "auto" ends with."""
    cooldown = make_cooldown("default", steps, Auto())
    return warmed_up(optimizer, steps, lambda done, _: cooldown.factor(done + 1))
