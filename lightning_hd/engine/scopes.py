"""Scopes and groups: a learned rate, the rates that follow it, and how both take over what others have changed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.checks import not_zero
from lightning_hd.optimizers import get_lr, is_normalized, set_lr
from lightning_hd.processes import Notices
from lightning_hd.rules import Observation, Rule


@dataclass
class Scope:
    """One learned learning rate: of the whole optimizer, or of one parameter group."""

    rule: Rule
    lr: float = 0.0  # α_t
    used: float = 0.0  # γ_t, the rate of the last step: α_t itself but for rules with a transition
    reference: float = not_zero(1.0)  # what α would be without learning
    from_zero: bool = False  # all groups are configured at 0: they count as equal, and the reference is 1
    tuned: bool = False  # whether a step was taken at the learned rate
    moved: bool = False  # whether the last step was such a step, and not at a rate of 0
    peak: float = math.inf  # α where the schedule was last near its own peak
    low: bool = False  # whether the schedule is low now
    since: int = 0  # the number of steps before the rate started, or started anew
    vanished: int = 0  # how many trial steps have left no trace
    last: Observation | None = None


@dataclass
class Group:
    """The rate of one parameter group."""

    scope: int
    lr: float  # effective learning rate of the last step
    base: float = 0.0  # the configured rate, or one that was written, over the scale at that time
    join: float = not_zero(
        1.0
    )  # the factor by which a group that is added in mid-training joins at its configured rate
    share: float = 0.0  # the group's rate at a scale of 1: what it is configured or scheduled at, times ``join``


def check_groups(optimizer: Optimizer, count: int, apart: bool) -> None:
    """Check the groups where others were before.

    Args:
        optimizer: The optimizer.
        count: How many groups there were.
        apart: Whether each group has a rate of its own.

    Raises:
        RuntimeError: Groups were removed.
        ValueError: Groups with rates of their own share one tensor.
    """
    groups = optimizer.param_groups
    if len(groups) < count:
        raise RuntimeError(
            f"{type(optimizer).__name__} has {len(groups)} parameter groups, but it had {count} in its last step: "
            "groups can be added but not removed while its learning rate is tuned"
        )
    tensors = [id(group["lr"]) for group in groups if isinstance(group["lr"], Tensor)]
    if apart and len(set(tensors)) < len(tensors):
        raise ValueError(
            "scope='group' needs a learning rate of its own for each group, but the optimizer's groups share one "
            "lr tensor: give each its own, as in {'params': ..., 'lr': torch.tensor(...)}"
        )


def grow(scope: Scope, factor: float) -> None:
    """Express a scope's rate for another reference, at the same scale."""
    scope.reference *= factor
    scope.lr *= factor
    scope.used *= factor


def join(scope: Scope, group: Group, default: float, scheduled: bool) -> bool:
    """Let a group that was added in mid-training join its scope, at its configured rate.

    If the rule has picked the first rate, the optimizer's default rate or a scheduled rate is not the size of a step.
    A group with such a rate joins in proportion to the others.

    Args:
        scope: The scope.
        group: The group, with the rate that it holds.
        default: The default rate of the optimizer.
        scheduled: Whether the held rates belong to a schedule.

    Returns:
        Whether it has joined. Otherwise the scope must start from scratch, because it has no rate yet.
    """
    in_proportion = scope.rule.picks_start and (scheduled or group.lr == default)
    group.base = group.lr
    if in_proportion and scope.from_zero and not group.lr and not scheduled:
        group.base = 1.0
    if not in_proportion and scope.used:
        group.join = scope.reference / scope.used
    group.share = group.base * group.join
    if in_proportion or scope.used:
        grow(scope, max(1.0, abs(group.share / scope.reference)))  # because α is the largest rate
    return in_proportion or scheduled or not (scope.from_zero and scope.used == 0)


def write(scope: Scope, group: Group, lr: float) -> None:
    """Take over a rate that was written into one group of a scope. The other groups keep theirs."""
    if scope.used:
        group.join, group.base = 1.0, lr / (scope.used / scope.reference)
        group.share = group.base
    elif group.share:  # the clamp held the scope at 0, so the ratio is not known: the whole scope comes back
        scope.lr = scope.used = scope.reference * (lr / group.share)
    else:
        group.base, group.share = lr, lr * group.join
        scope.lr = scope.used = scope.reference
    group.lr = lr
    grow(scope, max(1.0, abs(group.share / scope.reference)))


class Scopes:
    """The scopes and the groups of an optimizer. They take over what others add, schedule, or no longer schedule.

    Args:
        optimizer: The optimizer.
        rule: The rule. Each scope gets a copy.
        kind: ``"global"``: one scope; ``"group"``: one for each parameter group.
        notices: Where warnings and log messages go.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, kind: str, notices: Notices) -> None:
        self.optimizer = optimizer
        self.kind = kind
        self.scopes: list[Scope] = []
        self.groups: list[Group] = []
        self.held: list[float] = []  # what each param_groups[i]["lr"] held when a step began
        self.under_schedule = False  # whether that belongs to a schedule
        self.handed_over = False  # whether SWALR makes the rates, and nothing is learned
        self._rule = rule.bind(is_normalized(optimizer))  # a copy
        self._notices = notices

    def _bound_rule(self) -> Rule:
        return self._rule.bind(is_normalized(self.optimizer))

    def _add_groups(self) -> set[int]:
        """Take in groups that were added. Return the scopes that start from scratch."""
        fresh = set()
        default = float(self.optimizer.defaults.get("lr", math.nan))
        for i in range(len(self.groups), len(self.held)):
            group = Group(scope=i if self.kind == "group" else 0, lr=self.held[i])
            self.groups.append(group)
            if group.scope == len(self.scopes):
                self.scopes.append(Scope(self._bound_rule()))
                fresh.add(group.scope)
            elif not join(self.scopes[group.scope], group, default, self.under_schedule):
                fresh.add(group.scope)
        return fresh

    def _anchor(self, fresh: Iterable[int]) -> None:
        """Start scopes from the rates that their groups are configured with.

        If all groups of the optimizer are configured at 0, these count as equal, and the rule starts from 0, as in the
        paper. Otherwise a group at 0 is frozen.
        """
        configured = [self._configured(i) for i in range(len(self.groups))]
        for index in fresh:
            scope, members = self.scopes[index], [i for i, group in enumerate(self.groups) if group.scope == index]
            # a scheduler that is added in mid-training goes on from the present rate, whatever its own initial one is
            bases = [(scope.tuned and self.held[i]) or configured[i] for i in members]
            reference = max(bases, key=abs)
            scope.from_zero = reference == 0 and not any(configured)
            equal = scope.from_zero and not self.under_schedule
            scope.reference = reference or 1.0
            scope.lr = scope.used = 0.0 if equal else scope.reference
            for i, base in zip(members, bases, strict=True):
                group, lr = self.groups[i], self.held[i]
                group.lr, group.join = lr, 1.0
                group.base, group.share = (1.0, 1.0) if equal else (base, lr)
            if not scope.rule.picks_start and not scope.tuned:
                scope.rule.check_start(scope.lr)

    def _configured(self, index: int) -> float:
        group = self.optimizer.param_groups[index]
        return float(group["initial_lr"]) if self.under_schedule and "initial_lr" in group else self.held[index]

    def _go_on(self) -> None:
        """Write the rates of the last step where groups still hold those of a scheduler that was left out."""
        for settings, group, held in zip(self.optimizer.param_groups, self.groups, self.held, strict=False):
            if get_lr(settings) == held:
                set_lr(settings, group.lr)
        self._notices.warn(
            "no schedule",
            "the saved state is of a training with a scheduler, and there is none now: the rates go on from the last "
            f"ones. If there is a schedule, pass {self._notices.owner}(scheduled=True)",
        )

    def _hand_over(self, lrs: Sequence[float]) -> None:
        """Write effective rates where SWALR has yet to anneal them. From here on its rates are the rates."""
        self.handed_over = True
        for settings, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if settings["lr"] != settings["swa_lr"]:
                set_lr(settings, lr)
        for scope in self.scopes:
            scope.tuned = True
