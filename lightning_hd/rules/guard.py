"""The loss guard: detects that the loss has risen, so that the rule goes back to an earlier rate."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_hd.checks import check_count, check_flag, check_number

_SHORTEST, _PART = 10, 0.1
"""The length of a block: in steps at first, then as a part of the steps taken. So blocks, and false alarms, are few."""

_SIGMAS = 2.0
"""The loss has risen if the mean of a block exceeds the lowest one by so many standard errors."""


@dataclass
class LossGuard:
    """Compares the mean loss of each block of steps with that of the best block so far.

    The rate may be so high that nothing is learned any more, and the gradient may not show it. If units saturate, or
    weights are put back after each step, gradient and moves have nothing to do with each other. The loss shows it. It
    is compared with itself only, so its scale and its offset do not matter. Source: this project.
    """

    count: int = 0  # how many losses are in the block
    mean: float = 0.0
    deviations: float = 0.0  # sum of their squared deviations from the mean
    logs: float = 0.0  # sum of the logarithms of the rates
    known: bool = False  # whether a block is complete
    best: float = 0.0  # the lowest mean of a block
    best_error: float = 0.0  # the square of its standard error
    best_log: float = 0.0  # the mean logarithm of its rates

    def see(self, loss: float, log_lr: float, step: int) -> float | None:
        """Add the loss of a step.

        Args:
            loss: The loss, at the parameters before the step.
            log_lr: The logarithm of the rate of the step.
            step: The number of the step, counted from 1.

        Returns:
            If the loss has risen, the logarithm of the rate at which it was lowest; else ``None``.
        """
        self.count += 1
        off = loss - self.mean
        self.mean += off / self.count
        self.deviations += off * (loss - self.mean)
        self.logs += log_lr
        if self.count < max(_SHORTEST, _PART * step):
            return None
        error = self.deviations / max(self.count - 1, 1) / self.count
        mean, log, before, rise = self.mean, self.logs / self.count, self.best_log, self.mean - self.best
        higher = self.known and rise > _SIGMAS * math.sqrt(error + self.best_error)
        if higher or not self.known or rise < 0:
            self.known, self.best, self.best_error, self.best_log = True, mean, error, log
        self.count, self.mean, self.deviations, self.logs = 0, 0.0, 0.0, 0.0
        return before if higher else None

    def state_dict(self) -> dict[str, Any]:
        """All fields, as plain numbers."""
        return {f"guard_{name}": value for name, value in vars(self).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        own: dict[str, Any] = {name: state_dict[f"guard_{name}"] for name in vars(self)}
        own["count"], own["known"] = check_count("count", own["count"]), check_flag("known", own["known"])
        for name in ("mean", "logs", "best", "best_log"):
            own[name] = check_number(name, own[name])
        for name in ("deviations", "best_error"):
            own[name] = check_number(name, own[name], 0.0)
        vars(self).update(own)
