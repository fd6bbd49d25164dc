"""Rates: the learning rate of every parameter group, what is configured or scheduled times what is learned."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.directions import is_normalized
from lightning_hd.rules import Observation, Rule, check_number


@dataclass
class Scope:
    """One learned learning rate: of the whole optimizer, or of one parameter group."""

    rule: Rule
    lr: float = 0.0  # α_t
    used: float = 0.0  # γ_t, the rate of the last step: α_t itself but for rules with a transition
    reference: float = 1.0  # the configured rate (the highest scheduled one), so that the scale is used / reference
    from_zero: bool = False  # configured at 0: there is no ratio to keep, the groups count as equal, the reference is 1
    started: bool = False  # whether a step has been taken
    last: Observation | None = None


@dataclass
class Group:
    """The rate of one parameter group."""

    scope: int
    lr: float  # effective learning rate of the last step
    base: float = 0.0  # what the configuration, or the scheduler, gives the group
    join: float = 1.0  # for a group added in mid-training: what makes it join at its configured rate

    @property
    def configured(self) -> float:
        """The group's rate at a scale of 1."""
        return self.base * self.join


class Rates:
    """Effective learning rates of an optimizer's parameter groups.

    The rate of a group is ``configured / reference · α``: ``α`` is the scope's learned rate, ``reference`` what it
    would be without learning, namely the largest rate configured in the scope or, with a scheduler, the largest that
    the schedule has reached.

    Args:
        optimizer: The optimizer.
        rule: The rule, of which each scope gets a copy.
        kind: ``"global"`` or ``"group"``.
        min_lr: Lower clamp on the effective rates.
        max_lr: Upper clamp.

    Raises:
        ValueError: A configured rate is out of range, or groups that shall differ share one tensor.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, kind: str, min_lr: float, max_lr: float) -> None:
        self.optimizer = optimizer
        self.kind = kind
        self.scheduled: bool | None = None  # what the user says; None: see under_schedule
        self.scopes: list[Scope] = []
        self.groups: list[Group] = []
        self._rule = rule
        self._min_lr = min_lr
        self._max_lr = max_lr
        self.under_schedule = self._is_scheduled()
        self.sync()

    def sync(self) -> None:
        """Take over what others did since the last step: rates written, groups added, a scheduler built or stepped."""
        settings = self.optimizer.param_groups
        if len(settings) < len(self.groups):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has {len(settings)} parameter groups, {len(self.groups)} at its last "
                "step: groups can be added but not removed while its learning rate is tuned"
            )
        stale: set[int] = set()
        if self._is_scheduled() != self.under_schedule:
            self.under_schedule = not self.under_schedule
            stale.update(range(len(self.scopes)))
        for i in range(len(self.groups), len(settings)):
            group = Group(scope=i if self.kind == "group" else 0, lr=get_lr(settings[i]))
            self.groups.append(group)
            if group.scope == len(self.scopes):
                self.scopes.append(Scope(self._rule.bind(is_normalized(self.optimizer))))
                stale.add(group.scope)
            elif not self._join(group):
                stale.add(group.scope)
        for group, group_settings in zip(self.groups, settings, strict=True):
            if self.under_schedule:
                group.base = get_lr(group_settings)
            elif get_lr(group_settings) != group.lr:
                stale.add(group.scope)
        if stale and self.kind == "group":
            self._check_tensors()
        for scope in stale:
            self._anchor(scope)

    def follow_schedule(self, rates: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Let the references, and the rates, rise with the schedule: the rule works on the rate at its peak."""
        followed = []
        for i, (scope, (lr, used)) in enumerate(zip(self.scopes, rates, strict=True)):
            peak = max(abs(group.configured) for group in self._members(i))
            factor = peak / scope.reference if peak and scope.from_zero else max(1.0, peak / abs(scope.reference))
            scope.from_zero = scope.from_zero and not peak
            self._grow(scope, factor)
            followed.append((lr * factor, used * factor))
        return followed

    def effective(self, used: list[float]) -> list[tuple[float, float]]:
        """For each group its rate, and the derivative of that with respect to the scope's, which is ``used[scope]``.

        The derivative is 0 for a group that is clamped, unless its whole scope is: then it is that without clamps, so
        that the scope can come back.
        """
        rates, clamped = [], []
        for group in self.groups:
            reference = self.scopes[group.scope].reference
            free = used[group.scope]
            if group.configured != reference:
                free = group.configured * (free / reference)
            frozen = group.configured == 0 and not self.under_schedule  # configured so: no clamp shall thaw it
            lr = 0.0 if frozen else min(max(free, self._min_lr), self._max_lr)
            rates.append((lr, group.configured / reference))
            clamped.append(lr != free)
        inside = {group.scope for group, out in zip(self.groups, clamped, strict=True) if group.configured and not out}
        return [
            (lr, 0.0 if out and group.scope in inside else weight)
            for group, (lr, weight), out in zip(self.groups, rates, clamped, strict=True)
        ]

    def clamp(self, scope: int, lr: float) -> float:
        """A scope's rate, no further out than where all of its groups are clamped."""
        weights = [
            abs(group.configured / self.scopes[scope].reference) for group in self._members(scope) if group.configured
        ] or [1.0]
        high = max(self._max_lr / weight for weight in weights)
        # A schedule that goes down must not drive the scale up: below, its peak counts.
        peak = max(weights) if self.under_schedule else 1.0
        low = min(self._min_lr / (weight / peak) for weight in weights)
        return min(max(lr, low), high)

    def _is_scheduled(self) -> bool:
        if self.scheduled is not None:
            return self.scheduled
        return any("initial_lr" in settings for settings in self.optimizer.param_groups)

    def _members(self, scope: int) -> list[Group]:
        return [group for group in self.groups if group.scope == scope]

    def _anchor(self, index: int) -> None:
        """Start a scope from the rates that its groups are configured with now."""
        scope = self.scopes[index]
        configured = []
        for i, (group, settings) in enumerate(zip(self.groups, self.optimizer.param_groups, strict=True)):
            if group.scope != index:
                continue
            group.lr = group.base = get_lr(settings)
            group.join = 1.0
            lr = float(settings.get("initial_lr", group.lr)) if self.under_schedule else group.lr
            for value in (lr, group.lr):
                if not math.isfinite(value) or value < 0 <= self._min_lr:
                    allowed = "a finite number" + ("" if self._min_lr < 0 else " of at least 0 (or pass min_lr=None)")
                    name = f"lr of {type(self.optimizer).__name__} param_groups[{i}]"
                    raise ValueError(f"{name} must be {allowed}, got {value}")
            configured.append(lr)
        reference = max(configured, key=abs)
        scope.from_zero = reference == 0
        scope.reference = reference or 1.0
        scope.lr = scope.used = scope.reference
        if scope.from_zero and not self.under_schedule:
            scope.lr = scope.used = 0.0
            for group in self._members(index):
                group.base = 1.0
        if not scope.rule.picks_start and not scope.started:
            scope.rule.check_start(scope.lr)

    def _join(self, group: Group) -> bool:
        """Let a group that was added in mid-training join its scope at its configured rate; ``False``: from scratch."""
        scope = self.scopes[group.scope]
        group.base = group.lr
        if scope.used:
            group.join = scope.reference / scope.used
            self._grow(scope, max(1.0, abs(group.configured / scope.reference)))  # α is the largest rate
        return bool(scope.used) or self.under_schedule

    @staticmethod
    def _grow(scope: Scope, factor: float) -> None:
        """Express a scope's rate for another reference, at the same scale."""
        scope.reference *= factor
        scope.lr *= factor
        scope.used *= factor

    def _check_tensors(self) -> None:
        tensors = [settings["lr"] for settings in self.optimizer.param_groups if isinstance(settings["lr"], Tensor)]
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError(
                "scope='group' needs a learning rate of its own for each group, but the optimizer's groups share one "
                "lr tensor: give each group its own, as in {'params': ..., 'lr': torch.tensor(...)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return {
            "scheduled": self.under_schedule,
            "scopes": [
                {
                    "lr": scope.lr,
                    "used": scope.used,
                    "reference": scope.reference,
                    "from_zero": scope.from_zero,
                    "started": scope.started,
                    "rule": scope.rule.state_dict(),
                }
                for scope in self.scopes
            ],
            "groups": [{"lr": group.lr, "base": group.base, "join": group.join} for group in self.groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, for the same groups.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged, or of other groups.
        """
        saved_scopes, saved_groups = state_dict["scopes"], state_dict["groups"]
        scopes = [
            Scope(
                scope.rule,
                check_number("lr", saved["lr"]),
                check_number("used", saved["used"]),
                check_number("reference", saved["reference"]),
                from_zero=bool(saved["from_zero"]),
                started=bool(saved["started"]),
            )
            for scope, saved in zip(self.scopes, saved_scopes, strict=True)
        ]
        groups = [
            Group(group.scope, *(check_number(key, saved[key]) for key in ("lr", "base", "join")))
            for group, saved in zip(self.groups, saved_groups, strict=True)
        ]
        for scope, saved in zip(scopes, saved_scopes, strict=True):
            scope.rule.load_state_dict(saved["rule"])
        self.scopes, self.groups = scopes, groups
        self.under_schedule = bool(state_dict["scheduled"])
        if self.under_schedule and not self._is_scheduled():
            self.scheduled = True  # said by the user then, for a scheduler that leaves no mark
        if not self.under_schedule:
            for group, settings in zip(groups, self.optimizer.param_groups, strict=True):
                group.lr = set_lr(settings, group.lr)


def get_lr(settings: dict[str, Any]) -> float:
    """The rate that a parameter group of the optimizer holds."""
    return float(settings["lr"])


def set_lr(settings: dict[str, Any], lr: float) -> float:
    """Write it, in place where it is a tensor; returns what the group then holds."""
    if get_lr(settings) != lr:
        if isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(lr)
        else:
            settings["lr"] = lr
    return get_lr(settings)
