"""The loss guard: lowers the rate if the loss has risen, and takes that back if it has not helped."""

import math
from dataclasses import dataclass

from lightning_hd.checks import not_negative
from lightning_hd.rules.base import Context

_SHORTEST, _PART = 10, 0.1
"""The length of a block: in steps at first, then as a part of the steps taken. So blocks, and false alarms, are few."""

_FEWEST = 10
"""A block has so many numbers at least, so that its standard error is known."""

_SIGMAS = 2.0
"""The loss has risen if the mean of a block exceeds the lowest one by so many standard errors."""

_RETREAT = math.log(2) / 2
"""``log α`` goes this far below its value at the lowest loss, because even that may have been too high. With twice as
much, false alarms cost too much where the data change. With 0, weights of norm 1 end badly under SGD."""

_LIFT = math.log(2)
"""By how much the ceiling rises at a time. With half of it, false alarms in the climb hold batches of one too long."""


@dataclass
class LossGuard:
    """Compares the mean loss of each block of steps with that of the best block so far, and cuts the rate if it rose.

    The rate may be so high that nothing is learned any more, and the gradient may not show it. If units saturate, or
    weights are projected after each step, gradient and moves have nothing to do with each other. The loss shows it. It
    is compared with itself only, so its scale and its offset do not matter.

    The loss may also rise for other reasons: its weights, the data or an opponent have changed. So there is no cut
    while the moves of the block lower the loss at their ends, which for a convex loss means that they have not raised
    it. And a cut is an experiment. If the next block is not better than the one that caused the cut, the cut is undone,
    and twice the evidence is asked from then on. After a cut the rate has a ceiling, which doubles when the run does,
    and with each block that is the best since. So a false alarm during the climb does not hold it for long.

    In many short fits, a fit is over before a block is. So whole fits are compared as well (``whole``), each with the
    best one so far. A fit of a few steps is counted with the next. Source: this project.
    """

    count: int = 0  # how many losses are in the block, or means of some
    steps: int = 0  # for how many steps they stand
    mean: float = 0.0
    deviations: float = not_negative()  # sum of their squared deviations from the mean
    logs: float = 0.0  # sum of the logarithms of the rates
    slopes: float = 0.0  # sum of g_t · (θ_t - θ_{t-1})
    squares: float = not_negative()  # sum of their squares
    known: bool = False  # whether a block is complete
    best: float = 0.0  # the lowest mean of a block
    best_error: float = not_negative()  # the square of its standard error
    best_log: float = 0.0  # the mean logarithm of its rates
    tries: bool = False  # whether the last block has caused a cut
    tried: float = 0.0  # the mean of that block
    tried_error: float = not_negative()
    tried_log: float = 0.0  # log α before the cut
    demand: float = not_negative(1.0)  # the factor of the evidence that is asked for
    ceiling: float = math.inf  # the upper limit of log α since the last cut
    cut: bool = False  # whether this step has cut the rate, or has undone a cut
    whole: bool = False  # whether blocks are whole fits
    over: bool = False  # whether a fit is over, and the next one begins

    def limit(self, log_lr: float, loss: float, slope: float, context: Context) -> float:
        """``log α_t``, which is lower or higher than it was if a block is complete.

        Args:
            log_lr: The logarithm of the rate of the step.
            loss: The loss, at the parameters before the step.
            slope: ``g_t · (θ_t - θ_{t-1})``, by how much the last move would change the loss per unit of its length.
            context: What is known of the run.
        """
        self.cut = False
        if self.over:
            log_lr, self.over = self._close(log_lr, _SHORTEST), False
        self.ceiling += context.stride * math.log1p(1 / context.step)
        self.count += 1
        self.steps += context.stride
        off = loss - self.mean
        self.mean += off / self.count
        self.deviations += off * (loss - self.mean)
        self.logs += log_lr
        self.slopes += slope
        self.squares += slope**2
        if not self.whole:
            log_lr = self._close(log_lr, max(_SHORTEST, _PART * context.step))
        return min(log_lr, self.ceiling)

    def lift(self, log_lr: float) -> None:
        """Let the rate rise again: at least to twice what it is."""
        self.ceiling = max(self.ceiling, log_lr + _LIFT)

    def _close(self, log_lr: float, shortest: float) -> float:
        """``log α_t`` after the block, if it is complete."""
        if self.count >= _FEWEST and self.steps >= shortest:
            log_lr = self._judge(log_lr)
            self.count = self.steps = 0
            self.mean = self.deviations = self.logs = self.slopes = self.squares = 0.0
        return log_lr

    def _judge(self, log_lr: float) -> float:
        """``log α_t`` at the end of a block."""
        mean, error = self.mean, self.deviations / (self.count - 1) / self.count
        log, before = self.logs / self.count, self.best_log
        risen = self.known and mean - self.best > _SIGMAS * self.demand * math.sqrt(error + self.best_error)
        if self.known and mean < self.best and not self.tries:
            self.ceiling += _LIFT
        if risen or not self.known or mean < self.best:
            self.known, self.best, self.best_error, self.best_log = True, mean, error, log
        if self.tries:
            self.tries = False
            if mean >= self.tried - math.sqrt(error + self.tried_error):
                self.best, self.best_error, self.best_log = mean, error, self.tried_log
                self.demand, self.ceiling, self.cut = 2 * self.demand, math.inf, True
                return max(log_lr, self.tried_log)
        elif risen and before - _RETREAT < log_lr and self.slopes >= -_SIGMAS * math.sqrt(self.squares):
            self.tries, self.tried, self.tried_error, self.tried_log = True, mean, error, log_lr
            self.ceiling = self.best_log = before - _RETREAT
            self.cut = True
        return log_lr
