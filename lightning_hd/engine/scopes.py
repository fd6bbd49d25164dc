"""Scopes and groups: a learned rate, and the rates that follow it."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_hd.checks import check_count, check_divisor, check_flag, check_number
from lightning_hd.engine.trajectory import Trajectory
from lightning_hd.rules import Observation, Rule

_LOW = 0.5
"""A schedule is low below this part of its peak."""


_NUMBERS = ("lr", "used", "reference", "peak")
_FLAGS = ("from_zero", "started", "moved", "low")
_COUNTS = ("vanished", "since")
"""What is saved of a scope, beside its rule."""


@dataclass
class Scope:
    """One learned learning rate: of the whole optimizer, or of one parameter group."""

    rule: Rule
    lr: float = 0.0  # α_t
    used: float = 0.0  # γ_t, the rate of the last step: α_t itself but for rules with a transition
    reference: float = 1.0  # what α would be without learning
    from_zero: bool = False  # all groups are configured at 0: they count as equal, and the reference is 1
    started: bool = False  # whether a step was taken at the learned rate
    moved: bool = False  # whether the last step was such a step, and not at a rate of 0
    peak: float = math.inf  # α where the schedule was last near its own peak
    low: bool = False  # whether the schedule is low now
    since: int = 0  # the number of steps before the rate started, or started anew
    vanished: int = 0  # how many trial steps have left no trace
    trajectory: Trajectory = field(default_factory=Trajectory)  # α_t times the scheduled part of the peak
    last: Observation | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, except for the last observation."""
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, *_FLAGS, *_COUNTS)}
        return numbers | {"rule": self.rule.state_dict(), "trajectory": self.trajectory.state_dict()}

    def loaded(self, saved: dict[str, Any]) -> "Scope":
        """A scope from what ``state_dict`` returned. It has the rule of this one, whose state is loaded apart.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        scope = Scope(self.rule)
        for name in _NUMBERS:
            endless = name == "peak" and saved[name] == math.inf
            setattr(scope, name, math.inf if endless else check_number(name, saved[name]))
        check_divisor("reference", scope.reference)
        for name in _FLAGS:
            setattr(scope, name, check_flag(name, saved[name]))
        for name in _COUNTS:
            setattr(scope, name, check_count(name, saved[name]))
        scope.trajectory = Trajectory.loaded(saved["trajectory"])
        return scope

    def restart(self, rule: Rule, step_count: int) -> None:
        """Let a new rule pick the first rate again, after ``step_count`` steps."""
        rule.backoffs, rule.nonlinear, self.rule = self.rule.backoffs, self.rule.nonlinear, rule
        self.started, self.moved, self.low, self.vanished, self.since = False, False, False, 0, step_count
        self.trajectory = Trajectory()

    def at_peak(self, lr: float, part: float) -> float:
        """``α_t``. Where a schedule was low and rises again, it is at most what it was at the last peak.

        While a schedule is low, no step shows whether ``α`` is too high for its peak.

        Args:
            lr: The rate from the rule.
            part: The scheduled rate over the highest one so far.
        """
        return min(lr, self.peak) if self.low and part >= _LOW else lr

    def mark(self, part: float) -> None:
        """Record a step that was taken at this part of the schedule's peak."""
        self.low = part < _LOW
        self.peak = self.peak if self.low else self.lr
        if self.started:
            self.trajectory.add(self.lr * part)

    @property
    def waits(self) -> bool:
        """Whether the rule has yet to pick the first rate."""
        return self.rule.picks_start and not self.started

    @property
    def scale(self) -> float:
        """The learned scale."""
        return self.used / self.reference


@dataclass
class Group:
    """The rate of one parameter group."""

    scope: int
    lr: float  # effective learning rate of the last step
    base: float = 0.0  # the configured or scheduled rate of the group
    join: float = 1.0  # the factor by which a group that is added in mid-training joins at its configured rate
    zero: bool = False  # whether it is configured at 0: then no clamp moves it

    @property
    def unscaled(self) -> float:
        """The group's rate at a scale of 1."""
        return self.base * self.join
