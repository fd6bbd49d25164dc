"""Rates: the learning rate of every parameter group is the configured or scheduled rate times a learned scale."""

import math
from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.checks import check_divisor, check_flag, check_number
from lightning_hd.engine.lr import as_held, check_lr, get_lrs, set_lr
from lightning_hd.engine.scopes import Group, Scope
from lightning_hd.optimizers import is_normalized, set_rounding
from lightning_hd.rules import Rule


class Rates:
    """Effective learning rates of an optimizer's parameter groups: the configured or scheduled rates times a scale.

    The learned rate ``α`` of a scope is the scale times a reference. The reference is the largest rate that is
    configured in the scope, or the largest that its schedule has reached if that is higher. With a rule that picks its
    own first rate, it is the largest that the schedule has reached since the first step.

    Args:
        optimizer: The optimizer.
        rule: The rule. Each scope gets a copy.
        kind: ``"global"``: one scope; ``"group"``: one for each parameter group.
        min_lr: Lower clamp on the effective rates.
        max_lr: Upper clamp.

    Raises:
        ValueError: A configured rate is out of range, or groups with rates of their own share one tensor.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, kind: str, min_lr: float, max_lr: float) -> None:
        self.optimizer = optimizer
        self.kind = kind
        self.scheduled: bool | None = None  # set by the user; None: it is detected
        self.scopes: list[Scope] = []
        self.groups: list[Group] = []
        self.held: list[float] = []  # what each param_groups[i]["lr"] held when a step began
        self._rule = rule.bind(is_normalized(optimizer))  # a copy
        set_rounding(self._rule, optimizer)
        self._min_lr = min_lr
        self._max_lr = max_lr
        self.under_schedule = self.is_scheduled()
        self.sync()

    def sync(self) -> None:
        """Take over changes since the last step: rates written, groups added, a scheduler built or stepped."""
        settings = self.optimizer.param_groups
        if len(settings) < len(self.groups):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has {len(settings)} parameter groups, but it had {len(self.groups)} "
                "in its last step: groups can be added but not removed while its learning rate is tuned"
            )
        scheduled = self.is_scheduled()
        self.check()
        held = self.held
        fresh = set(range(len(self.scopes))) if scheduled != self.under_schedule else set()
        self.under_schedule = scheduled
        for i in range(len(self.groups), len(settings)):
            group = Group(scope=i if self.kind == "group" else 0, lr=held[i])
            self.groups.append(group)
            if group.scope == len(self.scopes):
                self.scopes.append(Scope(self._rule.bind(is_normalized(self.optimizer))))
                fresh.add(group.scope)
            elif not self._join(group):
                fresh.add(group.scope)
        for group, lr in zip(self.groups, held, strict=True):
            if scheduled:
                group.base = lr
            elif lr != group.lr and group.scope not in fresh:
                if all(held[i] != self.groups[i].lr for i in self.members(group.scope)):
                    fresh.add(group.scope)
                else:
                    self._write(group, lr)
        for scope in fresh:
            self._anchor(scope)

    @property
    def limits(self) -> tuple[float, float]:
        """The clamps."""
        return self._min_lr, self._max_lr

    def members(self, scope: int) -> range:
        """The indices of a scope's parameter groups."""
        return range(scope, scope + 1) if self.kind == "group" else range(len(self.groups))

    def follow_schedule(self, index: int) -> float:
        """Let a scope's reference and its rate rise with the schedule. The rule works on the rate at the peak.

        If the rule picks its own first rate, the rate does not rise: it was learned where the schedule was before.

        Returns:
            The factor by which the rate rose.
        """
        if not self.under_schedule:
            return 1.0
        scope = self.scopes[index]
        peak = self._scheduled(index)
        factor = peak / scope.reference if peak and scope.from_zero else max(1.0, peak / abs(scope.reference))
        scope.from_zero = scope.from_zero and not peak
        if scope.rule.picks_start:
            scope.reference = peak if peak and not scope.started else scope.reference * factor
            return 1.0
        self._grow(scope, factor)
        return factor

    def restart(self, index: int, step_count: int) -> None:
        """Let the rule of a scope start anew."""
        self.scopes[index].restart(self._rule.bind(is_normalized(self.optimizer)), step_count)

    def scheduled_part(self, index: int) -> float:
        """The scheduled rate of a scope over the highest one so far; 1 without a schedule."""
        if not self.under_schedule:
            return 1.0
        return self._scheduled(index) / abs(self.scopes[index].reference)

    def _scheduled(self, index: int) -> float:
        """The highest rate that the schedule gives the groups of a scope."""
        return max(abs(self.groups[i].unscaled) for i in self.members(index))

    def effective(self, used: Sequence[float], begun: Container[int] = ()) -> list[tuple[float, float]]:
        """For each group its rate, and the derivative of that with respect to the scope's rate, ``used[scope]``.

        Scopes in ``begun`` take their first step. A group that is clamped does not follow its scope, so the derivative
        is 0. But if all groups of a scope are clamped, it is taken without the clamps, so that the scope can come back.
        It is taken without them, too, as long as the rule has not picked the first rate.
        """
        rates, clamped = [], []
        for group in self.groups:
            scope = self.scopes[group.scope]
            reference = scope.reference
            free = used[group.scope]
            if group.unscaled != reference:
                free = group.unscaled * (free / reference)
            frozen = group.zero and group.base == 0
            lr = 0.0 if frozen else min(max(free, self._min_lr), self._max_lr)
            rates.append((lr, group.unscaled / reference))
            clamped.append(lr != free and (not scope.waits or group.scope in begun))
        inside = {group.scope for group, out in zip(self.groups, clamped, strict=True) if group.base and not out}
        return [
            (lr, 0.0 if out and group.scope in inside else weight)
            for group, (lr, weight), out in zip(self.groups, rates, clamped, strict=True)
        ]

    def clamp(self, index: int, lr: float) -> float:
        """Clamp a scope's rate to the range outside of which all of its groups are clamped.

        Under a schedule, a rate that is outside may stay there: a schedule that leaves the range must not move the
        scale.
        """
        scope = self.scopes[index]
        members = [self.groups[i] for i in self.members(index)]
        weights = [abs(group.unscaled / scope.reference) for group in members if group.base]
        if not weights:
            return scope.lr
        low = min(self._min_lr / weight for weight in weights)
        high = max(self._max_lr / weight for weight in weights)
        if self.under_schedule:
            low, high = min(low, scope.lr), max(high, scope.lr)
        return min(max(lr, low), high)

    def suggestions(self) -> list[float] | None:
        """A constant rate for each group, or its present one if it never moved; ``None`` if none did."""
        suggested = [scope.trajectory.suggestion() for scope in self.scopes]
        found = []
        for i, group in enumerate(self.groups):
            lr, highest = suggested[group.scope], self._scheduled(group.scope)
            configured = [abs(self._configured(j)) for j in self.members(group.scope)]
            ratio = group.unscaled / highest if highest else abs(self._configured(i)) / (max(configured) or 1.0)
            frozen = lr is None or (group.zero and group.base == 0)
            found.append(group.lr if frozen else min(max((lr or 0.0) * ratio, self._min_lr), self._max_lr))
        return None if all(lr is None for lr in suggested) else found

    def put_back(self, before: Sequence[float], during: Sequence[float]) -> bool:
        """Restore the rates in the groups after a step that raised, except for those that were changed in between.

        Returns:
            Whether all were restored.
        """
        groups = self.optimizer.param_groups
        holding = get_lrs(groups)  # before any is written, because groups may share a tensor
        for settings, held, lr, rate in zip(groups, holding, during, before, strict=False):
            if held == lr:
                set_lr(settings, rate)
        return all(held == lr for held, lr in zip(holding, during, strict=False))

    def give_back(self, before: Sequence[float], during: Sequence[float]) -> None:
        """Restore the scheduled rates after a step. If the optimizer has lowered its rate, lower them in proportion."""
        groups = self.optimizer.param_groups
        holding = get_lrs(groups)
        for settings, held, lr, rate in zip(groups, holding, during, before, strict=True):
            lowered = held / lr if lr else 1.0
            set_lr(settings, rate * lowered if 0 <= lowered < 1 else rate)

    def is_scheduled(self) -> bool:
        """Whether the rates in the groups belong to a schedule: set by the user, or detected."""
        if self.scheduled is not None:
            return self.scheduled
        return any("initial_lr" in settings for settings in self.optimizer.param_groups)

    def _configured(self, index: int) -> float:
        settings = self.optimizer.param_groups[index]
        return float(settings["initial_lr"]) if self.under_schedule and "initial_lr" in settings else self.held[index]

    def _anchor(self, index: int) -> None:
        """Start a scope from the rates that its groups are configured with."""
        scope = self.scopes[index]
        configured = []
        for i in self.members(index):
            group = self.groups[i]
            # a scheduler that is added in mid-training goes on from the present rate, whatever its own initial one is
            configured.append((scope.started and self.held[i]) or self._configured(i))
            group.lr = group.base = self.held[i]
            group.join = 1.0
            group.zero = configured[-1] == 0
        reference = max(configured, key=abs)
        # a group at 0 is frozen; but if all are at 0, the rule starts from there, as in the paper
        scope.from_zero = reference == 0 and not any(map(self._configured, range(len(self.groups))))
        scope.reference = reference or 1.0
        scope.lr = scope.used = scope.reference
        if scope.from_zero and not self.under_schedule:
            scope.lr = scope.used = 0.0
            for i in self.members(index):
                self.groups[i].base = 1.0
        if not scope.rule.picks_start and not scope.started:
            scope.rule.check_start(scope.lr)

    def _join(self, group: Group) -> bool:
        """Let a group that was added in mid-training join its scope; ``False``: the scope must start from scratch.

        The group joins at its configured rate, unless the clamp holds its scope at 0. If the rule has picked the first
        rate, the optimizer's default rate or a scheduled rate is not the size of a step. A group with such a rate joins
        in proportion to the others.
        """
        scope = self.scopes[group.scope]
        group.base = group.lr
        group.zero = group.lr == 0
        default = group.lr == float(self.optimizer.defaults.get("lr", math.nan))
        if scope.rule.picks_start and (default or self.under_schedule):
            if scope.from_zero and group.zero and not self.under_schedule:
                group.base, group.zero = 1.0, False
            self._grow(scope, max(1.0, abs(group.unscaled / scope.reference)))
            return True
        if scope.used:
            group.join = scope.reference / scope.used
            self._grow(scope, max(1.0, abs(group.unscaled / scope.reference)))  # because α is the largest rate
        return self.under_schedule or not (scope.from_zero and scope.used == 0)

    def _write(self, group: Group, lr: float) -> None:
        """Take over a rate that was written into one group of a scope. The other groups keep theirs."""
        scope = self.scopes[group.scope]
        group.zero = lr == 0
        if scope.used:
            group.base, group.join = lr / scope.scale, 1.0
        elif group.base:  # the clamp held the scope at 0, so the ratio is not known: the whole scope comes back
            scope.lr = scope.used = scope.reference * (lr / group.unscaled)
        else:
            group.base, scope.lr, scope.used = lr, scope.reference, scope.reference
        group.lr = lr
        self._grow(scope, max(1.0, abs(group.unscaled / scope.reference)))

    @staticmethod
    def _grow(scope: Scope, factor: float) -> None:
        """Express a scope's rate for another reference, at the same scale."""
        scope.reference *= factor
        scope.lr *= factor
        scope.used *= factor

    def check(self) -> None:
        """Read the rates in the optimizer's groups. Raise ``TypeError`` or ``ValueError`` if one is out of order."""
        settings = self.optimizer.param_groups
        scheduled = self.is_scheduled()
        names = [f"lr of {type(self.optimizer).__name__} param_groups[{i}]" for i in range(len(settings))]
        for name, group_settings in zip(names, settings, strict=True):
            check_lr(name, group_settings["lr"])
        self.held = get_lrs(settings)
        for name, lr in zip(names, self.held, strict=True):
            if not math.isfinite(lr) or (lr < 0 <= self._min_lr and not scheduled):
                allowed = "a finite number" + ("" if self._min_lr < 0 else " of at least 0 (or pass min_lr=None)")
                raise ValueError(f"{name} must be {allowed}, got {lr}")
        if self.kind == "group" and len(settings) > len(self.groups):
            self._check_tensors()

    def _check_tensors(self) -> None:
        tensors = [settings["lr"] for settings in self.optimizer.param_groups if isinstance(settings["lr"], Tensor)]
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError(
                "scope='group' needs a learning rate of its own for each group, but the optimizer's groups share one "
                "lr tensor: give each group its own, as in {'params': ..., 'lr': torch.tensor(...)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The rates of all scopes and groups, as plain numbers."""
        return {
            "scheduled": self.under_schedule,
            "scopes": [scope.state_dict() for scope in self.scopes],
            "groups": [
                {"lr": group.lr, "held": lr, "base": group.base, "join": group.join, "zero": group.zero}
                for group, lr in zip(self.groups, get_lrs(self.optimizer.param_groups), strict=False)
            ],
        }

    def written(self) -> list[bool]:
        """Whether each group holds another rate than that of the last step."""
        held = get_lrs(self.optimizer.param_groups)
        return [lr != group.lr for group, lr in zip(self.groups, held, strict=False)]

    def load_state_dict(self, state_dict: dict[str, Any], keep: Sequence[bool]) -> None:
        """Load what ``state_dict`` returned, for the same groups.

        Args:
            state_dict: The state.
            keep: For each group, whether the rate that it holds now stays, because it was written.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged, or of other groups.
        """
        saved_scopes, saved_groups = state_dict["scopes"], state_dict["groups"]
        scopes = [scope.loaded(saved) for scope, saved in zip(self.scopes, saved_scopes, strict=True)]
        groups = [
            Group(
                group.scope,
                check_number("lr", saved["lr"]),
                check_number("base", saved["base"]),
                check_divisor("join", saved["join"]),
                check_flag("zero", saved["zero"]),
            )
            for group, saved in zip(self.groups, saved_groups, strict=True)
        ]
        holding = [check_number("held", saved["held"]) for saved in saved_groups]
        under_schedule = check_flag("scheduled", state_dict["scheduled"])
        before = [scope.rule.state_dict() for scope in scopes]
        try:
            for scope, saved in zip(scopes, saved_scopes, strict=True):
                scope.rule.load_state_dict(saved["rule"])
        except Exception:
            for scope, own in zip(scopes, before, strict=True):
                scope.rule.load_state_dict(own)
            raise
        self.scopes, self.groups, self.under_schedule = scopes, groups, under_schedule
        if self.under_schedule and not self.is_scheduled():
            self.scheduled = True  # the user had set it, for a scheduler that cannot be detected
        if not self.under_schedule:
            for group, settings, lr, stays in zip(groups, self.optimizer.param_groups, holding, keep, strict=True):
                group.lr = as_held(settings, group.lr)
                if not stays:
                    set_lr(settings, lr)
