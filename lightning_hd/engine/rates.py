"""Rates: what each scope learns in a step, and the learning rate of each parameter group that follows from it.

The rate of a group is its configured or scheduled rate times the learned scale of its scope.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_hd.checks import not_zero
from lightning_hd.engine.decision import Decision, Step
from lightning_hd.engine.scopes import Scope, Scopes, check_groups, grow, write
from lightning_hd.hypergradient import Retained, copies_of
from lightning_hd.optimizers import LARGEST, apply_lr, has_scheduler, is_marked, read_lrs, rounding_of, unwrap
from lightning_hd.processes import Notices
from lightning_hd.rules import Context, Observation, Rule

_LOW, _FALLEN = 0.5, 0.999
"""A schedule is low, and has begun to fall, below these parts of its peak."""

_ROUNDING = 2.0**-23
"""The relative rounding of gradients in float32."""

_POINTS = 256
"""The largest number of points. When it is exceeded, every second one is dropped, and half as many are added later."""


@dataclass
class Trajectory:
    """The rates of the steps so far, one of every ``stride``."""

    points: list[float] = field(default_factory=list)
    stride: int = not_zero(1)
    steps: int = 0

    def add(self, lr: float) -> None:
        """Add a step that was taken at this rate."""
        if self.steps % self.stride == 0:
            self.points.append(lr)
        self.steps += 1
        if len(self.points) > _POINTS:
            self.points = self.points[::2]
            self.stride *= 2


class Rates(Scopes):
    """The rates of an optimizer's parameter groups.

    The learned rate ``α`` of a scope is the scale times a reference. The reference is the largest rate that is
    configured in the scope, or the largest that its schedule has reached if that is higher. With a rule that picks its
    own first rate, it is the largest that the schedule has reached since the first step.

    Args:
        optimizer: The optimizer, or a wrapper of it.
        rule: The rule. Each scope gets a copy.
        kind: ``"global"``: one scope; ``"group"``: one for each parameter group.
        limits: The lower and the upper clamp on the effective rates.
        scheduled: Whether the rates in the groups belong to a schedule; ``None``: it is detected.
        notices: Where warnings and log messages go.

    Raises:
        TypeError, ValueError: A configured rate is out of order, or groups with rates of their own share one tensor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        kind: str,
        limits: tuple[float, float],
        scheduled: bool | None,
        notices: Notices,
    ) -> None:
        super().__init__(unwrap(optimizer), rule, kind, notices)
        self.limits = limits
        self.trajectories: list[Trajectory] = []  # of each scope: α_t times the scheduled part of the peak
        self._scheduled = scheduled  # set by the user; None: it is detected
        self._copies = copies_of(self.optimizer)  # they know of the states that it has loaded
        self._wrapped = (self.optimizer, optimizer)
        self._rounding = min(_ROUNDING, rounding_of(self.optimizer) or _ROUNDING)
        self.under_schedule = self.is_scheduled()
        if self.under_schedule and has_scheduler(*self._wrapped):
            self._scheduled = True  # even if a state without its mark is loaded
        self.sync()

    # ------------------------------------------------------------------ what others have changed

    def read(self) -> list[float]:
        """The rates in the optimizer's groups. Raise ``TypeError`` or ``ValueError`` if one is out of order."""
        return read_lrs(self.optimizer, signed=self.is_scheduled() or self.limits[0] < 0)

    def sync(self) -> None:
        """Take over changes since the last step: rates written, groups added, a scheduler built or stepped."""
        if len(self.optimizer.param_groups) != len(self.groups):
            check_groups(self.optimizer, len(self.groups), apart=self.kind == "group")
        scheduled = self.is_scheduled()
        if self.under_schedule and not scheduled:
            self._go_on()
        held = read_lrs(self.optimizer, signed=scheduled or self.limits[0] < 0)
        fresh = set(range(len(self.scopes))) if scheduled != self.under_schedule else set()
        self.held, self.under_schedule, known = held, scheduled, len(self.groups)
        if len(held) > known:
            fresh |= self._add_groups()
            self.trajectories += [Trajectory() for _ in self.scopes[len(self.trajectories) :]]
        for group, lr in zip(self.groups, held, strict=True):
            if scheduled:
                group.share = lr * group.join
            elif lr != group.lr and group.scope not in fresh:
                if all(held[i] != self.groups[i].lr for i in self.members(group.scope) if i < known):
                    fresh.add(group.scope)
                else:
                    write(self.scopes[group.scope], group, lr)
        if fresh:
            self._anchor(fresh)

    def is_scheduled(self) -> bool:
        """Whether the rates in the groups belong to a schedule: set by the user, or detected.

        The mark of a scheduler in the groups shows nothing if it came with a state, unless one was built here.
        """
        if self._scheduled is not None:
            return self._scheduled
        return is_marked(self.optimizer.param_groups) and (not self._copies.stale or has_scheduler(*self._wrapped))

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows of a scheduler, whose mark torch does not copy. It does not keep a wrapper."""
        return {**vars(self), "_scheduled": self.is_scheduled() or self._scheduled, "_wrapped": (self.optimizer,)}

    def hand_over(self) -> None:
        """Let SWALR, which was built since the last step, go on from the learned rates. The scales stay at 1."""
        self.sync()
        self._hand_over([lr for lr, _ in self.effective([scope.used for scope in self.scopes])])
        self.held = self.read()
        self._anchor(range(len(self.scopes)))

    def restart(self, index: int, step_count: int) -> None:
        """Let the rule of a scope pick the first rate again, after ``step_count`` steps."""
        scope, rule = self.scopes[index], self._bound_rule()
        rule.backoffs = scope.rule.backoffs
        scope.rule, scope.since, scope.vanished = rule, step_count, 0
        scope.tuned = scope.moved = scope.low = False
        self.trajectories[index] = Trajectory()

    # ------------------------------------------------------------------ what each scope learns

    def decide(self, step: Step) -> None:
        """Decide ``α_t`` and ``γ_t`` of each scope. If a number is not finite, they are the last ones."""
        step.decisions = [self._decide(step, i, seen) for i, seen in enumerate(step.seen)]
        if not self.handed_over and self.under_schedule and any("swa_lr" in g for g in self.optimizer.param_groups):
            self._notices.warn(
                "swa",
                "the learned scale multiplies the rates of SWALR, so steps do not use swa_lr itself. To use it, leave "
                "SWALR to StochasticWeightAveraging in a Trainer, or call detach() in a loop where averaging begins",
            )
        if self.under_schedule and all(scope.from_zero for scope in self.scopes):
            self._notices.warn(
                "zero schedule",
                "the scheduled learning rate is 0, and no scale changes that. Nothing is learned unless it rises",
            )

    def _decide(self, step: Step, index: int, seen: Observation | None) -> Decision:
        scope = self.scopes[index]
        rule, context, backoffs = scope.rule, self._context(step, index), scope.rule.backoffs
        if step.look.taken or step.look.seen:
            step.rules.append(rule.state_dict())
        finite = seen is None or all(map(math.isfinite, seen))
        stopped = step.stopped and scope.tuned
        lr, cause = scope.lr, "the loss has risen"
        if seen is not None and finite and not stopped:
            lr = number(rule.update(lr, seen, context), rule, "update")
            if rule.backoffs > backoffs:
                cause = f"the gradient's norm leapt to {seen.grad_norm:.3g}"
            lr = self._bounded(step, index, lr) if rule.long_horizon else lr
            loss = self._minimized(step.loss, index)
            if loss is not None and math.isfinite(lr):
                lr = number(rule.watch(lr, loss, context), rule, "watch")
        lr *= self._follow_schedule(index, stopped)
        largest = math.inf if waits(scope) else LARGEST  # a configured rate does not count where the rule picks one
        if finite and abs(lr) <= largest:
            lr = self.clamp(index, lr)
            used = (lr if stopped else number(rule.used(lr, context), rule, "used")) * step.factor
            if abs(used) <= largest:
                if rule.backoffs > backoffs:
                    backed_off = f"the rate backs off from {scope.used:.3g} to {used:.3g}"
                    self._notices.log(f"step {step.number}: {cause}; {backed_off}")
                return Decision(lr, used)
        made = f"the rate that {type(rule).__name__} made of {seen}"
        what = made if finite else f"a number of {seen}"
        self.stay(step, f"{what} is not a finite number; the learning rate stays at {scope.used:g}")
        return Decision(scope.lr, scope.used)

    def _context(self, step: Step, index: int) -> Context:
        since, falls = self.scopes[index].since, not self.under_schedule or self._scheduled_part(index) < _FALLEN
        number, cooldown = step.number - since, step.cooldown if falls else 0.0
        length = max(step.total - since, number)
        return Context(number, cooldown, self._rounding, step.nonlinear, step.look.stride, length)

    def _minimized(self, loss: float | None, index: int) -> float | None:
        """The loss with its sign flipped if the groups of a scope maximize it; unknown if only some of them do."""
        if loss is None:
            return None
        signs = {-1.0 if self.optimizer.param_groups[i].get("maximize") else 1.0 for i in self.members(index)}
        return loss * signs.pop() if len(signs) == 1 else None

    def _bounded(self, step: Step, index: int, lr: float) -> float:
        """``α_t`` of a rule with a long horizon, bounded where former moves would ask for a rate that is too high.

        While a schedule is low, no step shows whether ``α`` is too high for its peak. So where it rises again, ``α`` is
        at most what it was at the last peak. In the cooldown, ``α`` does not rise: old moves at higher rates would ask
        for it.
        """
        scope = self.scopes[index]
        if scope.low and self._scheduled_part(index) >= _LOW:
            lr = min(lr, scope.peak)
        return min(lr, scope.lr) if step.factor < 1 else lr

    def _follow_schedule(self, index: int, stopped: bool) -> float:
        """Raise a scope's reference and its rate with the schedule. Return the factor by which the rate rose.

        The rule works on the rate at the peak. If the rule picks its own first rate, the rate does not rise: it was
        learned where the schedule was before. But once tuning has stopped, the scale stays as it is.
        """
        if not self.under_schedule:
            return 1.0
        scope, highest = self.scopes[index], self._highest(index)
        factor = max(1.0, highest / abs(scope.reference))
        if scope.from_zero and highest:
            factor, scope.from_zero = highest / scope.reference, False
        if stopped or not scope.rule.picks_start:
            grow(scope, factor)
            return factor
        scope.reference = highest if highest and not scope.tuned else scope.reference * factor
        return 1.0

    def stay(self, step: Step, what: str) -> None:
        """Note that a number is not finite, so that a scope stays at its rate."""
        step.finite = False
        self._notices.warn(
            "not finite", f"step {step.number}: {what}. Further such steps are counted in nonfinite_steps"
        )

    def retain(self, step: Step) -> None:
        """Decide what is left of the former moves of each scope, for rules with a long horizon.

        What is not finite is not remembered, even where no rule learns from it.
        """
        for i, (sight, decision) in enumerate(zip(step.sights, step.decisions, strict=True)):
            rule, context = self.scopes[i].rule, self._context(step, i)
            if rule.long_horizon and all(map(math.isfinite, sight.observation)):
                moves, smoothing = rule.discount(decision.lr * step.factor, context), rule.smoothing(context)
                step.retained.append(Retained(number(moves, rule, "discount"), number(smoothing, rule, "smoothing")))
            else:
                step.retained.append(None)

    def remember(self, step: Step) -> None:
        """Take over the rates of a step that was taken."""
        for group, lr in zip(self.groups, step.lrs, strict=True):
            group.lr = lr
        for i, (scope, decision) in enumerate(zip(self.scopes, step.decisions, strict=True)):
            scope.lr, scope.used = decision
            scope.last = step.seen[i] if step.look.seen else scope.last
            members = self.members(i)
            follows = step.sights[i].has_gradient and any(step.weights[j] for j in members)
            scope.tuned |= follows and (i in step.picked or not waits(scope))
            scope.moved = scope.tuned and follows and any(step.lrs[j] for j in members)
            part = self._scheduled_part(i)
            scope.low = part < _LOW
            scope.peak = scope.peak if scope.low else scope.lr
            if scope.tuned:
                self.trajectories[i].add(scope.lr * part)

    # ------------------------------------------------------------------ the rates of the groups

    def members(self, scope: int) -> range:
        """The indices of a scope's parameter groups."""
        return range(scope, scope + 1) if self.kind == "group" else range(len(self.groups))

    def _highest(self, index: int) -> float:
        """The highest rate that the schedule, or the configuration, gives the groups of a scope."""
        return max(abs(self.groups[i].share) for i in self.members(index))

    def _scheduled_part(self, index: int) -> float:
        """The scheduled rate of a scope over the highest one so far; 1 without a schedule."""
        return self._highest(index) / abs(self.scopes[index].reference) if self.under_schedule else 1.0

    def effective(self, used: Sequence[float], picked: Container[int] = ()) -> list[tuple[float, float]]:
        """For each group its rate, and the derivative of that with respect to the scope's rate, ``used[scope]``.

        Scopes in ``picked`` take their first step. A group that is clamped does not follow its scope, so the derivative
        is 0. But if all groups of a scope are clamped, it is taken without the clamps, so that the scope can come back.
        It is taken without them, too, as long as the rule has not picked the first rate.
        """
        low, high = self.limits
        rates, inside = [], set()
        for group in self.groups:
            scope, free = self.scopes[group.scope], used[group.scope]
            if group.share != scope.reference:
                free = group.share * (free / scope.reference)
            frozen = group.share == 0 == group.base
            lr = 0.0 if frozen else min(max(free, low), high)
            clamped = lr != free and (not waits(scope) or group.scope in picked)
            rates.append((lr, group.share / scope.reference, clamped))
            if group.share and not clamped:
                inside.add(group.scope)
        return [
            (lr, 0.0 if clamped and group.scope in inside else weight)
            for group, (lr, weight, clamped) in zip(self.groups, rates, strict=True)
        ]

    def apply(self, step: Step) -> None:
        """Write the rates of the update into the groups."""
        rates = self.effective([decision.used for decision in step.decisions], step.picked)
        step.weights = [weight for _, weight in rates]
        for i, ((lr, _), held) in enumerate(zip(rates, step.held, strict=True)):
            step.lrs.append(apply_lr(self.optimizer, i, step.trial.get(i, lr), held))

    def clamp(self, index: int, lr: float) -> float:
        """Clamp a scope's rate to the range outside of which all of its groups are clamped.

        Under a schedule, a rate that is outside may stay there: a schedule that leaves the range must not move the
        scale.
        """
        scope = self.scopes[index]
        shares = [abs(self.groups[i].share / scope.reference) for i in self.members(index) if self.groups[i].share]
        if not shares:
            return scope.lr
        low = min(self.limits[0] / share for share in shares)
        high = max(self.limits[1] / share for share in shares)
        if self.under_schedule:
            low, high = min(low, scope.lr), max(high, scope.lr)
        return min(max(lr, low), high)


def waits(scope: Scope) -> bool:
    """Whether the rule has yet to pick the first rate."""
    return scope.rule.picks_start and not scope.tuned


def number(value: Any, rule: Rule, method: str) -> float:
    """What a rule's method returned, as a float.

    Raises:
        TypeError: It is not a number.
    """
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(rule).__name__}.{method} must return a number, got {value!r}")
    return float(value)
