"""Saves and loads the state of the tuning of one optimizer, and checks what is loaded."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hd.checks import check_count, check_fields, check_flag, save_fields
from lightning_hd.engine.decision import Before
from lightning_hd.engine.rates import Rates, Trajectory
from lightning_hd.engine.scopes import Group, Scope
from lightning_hd.engine.step import Tuning
from lightning_hd.optimizers import as_held, get_lrs, set_lr
from lightning_hd.rules import Rule, rule_name

_LEARNED = ("scopes", "groups", "held", "trajectories", "under_schedule")
"""What loading changes in the rates, or what comes before it."""


def save(tuning: Tuning) -> dict[str, Any]:
    """The state: plain numbers, and what the view remembers."""
    if len(tuning.optimizer.param_groups) > len(tuning.rates.groups):
        tuning.abandon()  # a step that failed
        tuning.sync()  # with the groups that were added since the last step
    return {
        **_kind(tuning),
        "step_count": tuning.step_count,
        "nonfinite_steps": tuning.nonfinite_steps,
        "begin": tuning.cooldown.begin,
        "nonlinear": tuning.linearity.failed,
        "rates": _save_rates(tuning.rates, tuning.before),
        "view": tuning.view.state_dict(),
        "looks": tuning.looks.state_dict(),
    }


def load(tuning: Tuning, state_dict: dict[str, Any], loaded: bool) -> None:
    """Load what ``save`` returned. If that fails, the tuning stays as it was.

    Args:
        tuning: The tuning.
        state_dict: The state.
        loaded: Whether the optimizer has loaded its state already. Then the rates that it holds stay. Otherwise only
            rates stay that were written.

    Raises:
        ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, or damaged.
    """
    _check_kind(state_dict, tuning)
    tuning.abandon()
    before, held = [group.lr for group in tuning.rates.groups], get_lrs(tuning.optimizer.param_groups)
    written = [lr != was for lr, was in zip(held, before, strict=False)] + [False] * (len(held) - len(before))
    parts: list[Any] = [tuning.looks, tuning.view, tuning.writes]
    kept = [(part, dict(vars(part))) for part in parts]
    learned = copy.deepcopy({name: getattr(tuning.rates, name) for name in _LEARNED})
    kept.append((tuning.rates, {**vars(tuning.rates), **learned}))
    tuning.sync()
    scheduled = tuning.rates.under_schedule
    try:
        *counts, begin = (check_count(name, state_dict[name]) for name in ("step_count", "nonfinite_steps", "begin"))
        nonlinear = check_flag("nonlinear", state_dict["nonlinear"])
        tuning.looks.load_state_dict(state_dict["looks"])
        tuning.view.load_state_dict(state_dict["view"])
        stays = [loaded or was_written for was_written in written]
        _load_rates(tuning.rates, state_dict["rates"], stays)  # the last that can fail; it changes all or nothing
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        for part, attributes in kept:
            vars(part).clear()
            vars(part).update(attributes)
        raise ValueError(f"the saved state is damaged, or of other parameter groups: {error!r}") from error
    tuning.lost_schedule = scheduled and not tuning.rates.under_schedule
    tuning.linearity.failed = nonlinear
    tuning.step_count, tuning.nonfinite_steps = counts
    tuning.cooldown.begin_at(begin)


def begin_from(tuning: Tuning, state_dict: dict[str, Any]) -> None:
    """Begin a training at the rates that another one has learned, with what its rules remember, and its moves.

    The groups keep the rates that they are configured with, for these set the ratios, and their own schedule.

    Raises:
        ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, or damaged.
    """
    rates = tuning.rates
    groups, scopes, scheduled = rates.groups, rates.scopes, rates.is_scheduled()  # load() syncs them
    load(tuning, state_dict, loaded=True)
    for i, (scope, own) in enumerate(zip(rates.scopes, scopes, strict=True)):
        bases = [abs(rates.groups[j].base) for j in rates.members(i)]
        risen = scope.reference / (max(bases) or 1.0) if scheduled and rates.under_schedule else 1.0
        scope.reference, scope.from_zero, scope.moved = own.reference * risen, own.from_zero, False
        scope.rule.begin("fit")
        rates.trajectories[i] = Trajectory()
    rates.groups, rates.under_schedule = groups, scheduled
    tuning.lost_schedule = False
    tuning.looks.begin()
    tuning.view.relocate()
    tuning.cooldown.begin_at(tuning.step_count)


def _kind(tuning: Tuning) -> dict[str, str]:
    """What must be the same where a state is loaded."""
    names = type(tuning.optimizer).__name__, type(tuning.rule).__name__
    return {"optimizer": names[0], "rule": names[1], "scope": tuning.rates.kind}


def _check_kind(state_dict: Any, tuning: Tuning) -> None:
    """Raise ``ValueError`` if a state is of another kind than this one."""
    now = _kind(tuning)
    known = isinstance(state_dict, dict) and {*now, "rates", "view", "looks"} <= state_dict.keys()
    if not known or not all(isinstance(state_dict[key], str) for key in now):
        raise ValueError("the state is not what HypergradientLR.state_dict() returned")
    for key in now:
        if state_dict[key] != now[key]:
            saved, mine = (rule_name(d[key]) if key == "rule" else d[key] for d in (state_dict, now))
            raise ValueError(f"the saved state has {key}={saved!r}, now it is {mine!r}")


@dataclass
class _SavedGroup(Group):
    """A group, and the rate that the optimizer held between the steps."""

    held: float = 0.0


def _save_rates(rates: Rates, before: Before) -> dict[str, Any]:
    """Save the rates as they were before a step that runs."""
    held = before.lrs(get_lrs(rates.optimizer.param_groups))
    states = [*before.rules, *(scope.rule.state_dict() for scope in rates.scopes[len(before.rules) :])]
    anchors = [*before.anchors, *({} for _ in rates.scopes[len(before.anchors) :])]
    return {
        "scheduled": rates.under_schedule,
        "scopes": [
            {**save_fields(scope, without=("rule", "last")), **anchor, "rule": state}
            for scope, anchor, state in zip(rates.scopes, anchors, states, strict=True)
        ],
        "trajectories": [save_fields(trajectory) for trajectory in rates.trajectories],
        "groups": [{**save_fields(group), "held": lr} for group, lr in zip(rates.groups, held, strict=False)],
    }


def _load_rates(rates: Rates, saved: dict[str, Any], stays: Sequence[bool]) -> None:
    """Load the rates of the same groups. ``stays`` says for each whether the rate that it holds now stays."""
    if len(saved["groups"]) != len(rates.groups):
        raise ValueError(
            f"the saved state has {len(saved['groups'])} parameter groups, the optimizer {len(rates.groups)}"
        )
    scopes = [
        check_fields(Scope, own, rule=_loaded(scope.rule, own["rule"]), last=None)
        for own, scope in zip(saved["scopes"], rates.scopes, strict=True)
    ]
    trajectories = [check_fields(Trajectory, own) for own, _ in zip(saved["trajectories"], scopes, strict=True)]
    groups = [
        check_fields(_SavedGroup, own, scope=group.scope)
        for own, group in zip(saved["groups"], rates.groups, strict=True)
    ]
    under_schedule = check_flag("scheduled", saved["scheduled"])
    rates.scopes, rates.trajectories, rates.under_schedule = scopes, trajectories, under_schedule
    rates.groups = [Group(own.scope, own.lr, own.base, own.join, own.share) for own in groups]
    rates.held = [own.held for own in groups]
    if not rates.is_scheduled():
        for group, own, param_group, stay in zip(
            rates.groups, groups, rates.optimizer.param_groups, stays, strict=True
        ):
            group.lr = as_held(param_group, group.lr)
            if not stay:
                set_lr(param_group, own.held)


def _loaded(rule: Rule, state: dict[str, Any]) -> Rule:
    """A copy of a rule that has loaded a state, so that the rule itself stays as it is if that fails."""
    rule = copy.deepcopy(rule)
    rule.load_state_dict(state)
    return rule
