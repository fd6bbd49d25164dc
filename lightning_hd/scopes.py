"""What is known of one learned rate, and of the groups that follow it."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_hd.checks import check_count, check_divisor, check_flag, check_number
from lightning_hd.rules import Observation, Rule
from lightning_hd.trajectory import Trajectory

_LOW = 0.5
"""The part of its peak below which a schedule is low."""


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
    from_zero: bool = False  # configured at 0: there is no ratio to keep, the groups count as equal, the reference is 1
    started: bool = False  # whether a step has been taken at a rate of its own
    moved: bool = False  # whether the last step was one, and not at a rate of 0
    peak: float = math.inf  # α where the schedule was last near its own peak
    low: bool = False  # whether it is not now
    since: int = 0  # the steps that were taken before its rate started, or started anew
    vanished: int = 0  # how many steps on trial have left no trace
    trajectory: Trajectory = field(default_factory=Trajectory)  # α_t, times what the schedule says over its peak
    last: Observation | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it but what the last step has shown, as plain numbers."""
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, *_FLAGS, *_COUNTS)}
        return numbers | {"rule": self.rule.state_dict(), "trajectory": self.trajectory.state_dict()}

    def loaded(self, saved: dict[str, Any]) -> "Scope":
        """A scope with what ``state_dict`` returned; its rule is this one's, which has yet to load its own.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
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
        """Let the rule pick the first rate again, after so many steps."""
        rule.brakes, rule.nonlinear, self.rule = self.rule.brakes, self.rule.nonlinear, rule
        self.started, self.moved, self.low, self.vanished, self.since = False, False, False, 0, step_count
        self.trajectory = Trajectory()

    def at_peak(self, lr: float, part: float) -> float:
        """``α_t``, no higher than it was at the last peak of a schedule that has been low and comes back.

        Where a schedule is low, nothing shows what is too high at its peak.

        Args:
            lr: What the rule asks for.
            part: What the schedule says, over the highest that it has said.
        """
        return min(lr, self.peak) if self.low and part >= _LOW else lr

    def mark(self, part: float) -> None:
        """A step was taken where the schedule says this part of its peak."""
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
    base: float = 0.0  # what the configuration, or the scheduler, gives the group
    join: float = 1.0  # for a group added in mid-training: what makes it join at its configured rate
    zero: bool = False  # configured at 0, so that no clamp shall move it

    @property
    def unscaled(self) -> float:
        """The group's rate at a scale of 1."""
        return self.base * self.join
