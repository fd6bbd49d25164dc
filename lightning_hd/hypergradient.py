"""HypergradientLR: attached to one torch optimizer; gradients and directions in, learning rate out."""

import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.directions import (
    DIRECTION,
    Direction,
    Measured,
    check_optimizer,
    direction_from_dict,
    direction_of,
    is_normalized,
    objective_gradient,
)
from lightning_hd.reduction import as_real, products, squared_norm, totals, widen
from lightning_hd.rules import Observation, Rule, check_number, make_rule

DISCOUNTED = "hd_discounted"
"""Key in ``optimizer.state[p]`` of the discounted sum of directions, for rules with a long horizon."""

_PROBE = 2.0**-6
"""The rate of a step whose direction is wanted before its rate is known, or where the rate is 0. A power of two, so
that dividing by it is exact; small enough for every optimizer to be linear, large enough not to vanish in rounding."""

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


@dataclass
class _Scope:
    """One learned learning rate: of the whole optimizer, or of one parameter group."""

    rule: Rule
    lr: float = 0.0  # α_t
    used: float = 0.0  # γ_t, the rate of the last step: α_t itself but for rules with a transition
    reference: float = 1.0  # the configured rate, so that the learned scale is used / reference
    from_zero: bool = False  # configured at 0: there is no ratio to keep, the groups count as equal, the reference is 1
    started: bool = False  # whether a step has been taken
    last: Observation | None = None


@dataclass
class _Group:
    """What is known of one parameter group of the optimizer, all of it about the last step."""

    scope: int
    lr: float  # effective learning rate
    base: float = 0.0  # what the configuration, or the scheduler, gives the group
    join: float = 1.0  # for a group added in mid-training: what makes it join at its configured rate
    weight: float = 1.0  # derivative of the group's rate with respect to the scope's
    direction: Direction | None = None
    moved: set[Tensor] = field(default_factory=set)  # the parameters that were updated


@dataclass
class _GroupStep:
    """One parameter group during a call of ``optimizer.step``."""

    restore: float  # what param_groups[i]["lr"] held before
    lr: float  # what it holds during the update
    weight: float
    direction: Direction
    moved: list[Tensor]
    probed: bool  # the step is taken at the rate of the probe, and rescaled afterwards


@dataclass
class _Step:
    """One call of ``optimizer.step``, from when the gradients are there until the parameters have moved."""

    rates: list[tuple[float, float]]  # α_t and γ_t of each scope
    observations: list[Observation | None]
    groups: list[_GroupStep] = field(default_factory=list)
    kept: dict[Tensor, Tensor] = field(default_factory=dict)  # what the directions need once the update is done
    before: dict[Tensor, Tensor] = field(default_factory=dict)  # θ_{t-1}, for probed groups


class HypergradientLR:
    r"""Tunes the learning rate of an optimizer by hypergradient descent, in any training loop.

    After it is built, ``loss.backward(); optimizer.step()`` needs no other change. Around every step, between the
    backward pass and the update, the learning rate ``α`` follows the derivative of the loss with respect to it,

    .. math:: h_t = \frac{\partial f(\theta_{t-1})}{\partial \alpha} = -g_t \cdot d_{t-1},

    ``g_t`` being the new gradient and ``d_{t-1}`` the direction of the last update, ``θ_{t-1} = θ_{t-2} - α d_{t-1}``.
    Source: "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin et al., ICLR 2018, arXiv 1703.04782),
    Section 3. The cost is two or three passes over gradients and directions a step, and, for SGD without momentum,
    Nesterov's and optimizers that have no formula in :mod:`lightning_hd.directions`, one copy of the parameters' size.

    ``g_t`` is the gradient that the optimizer sees: after clipping and unscaling, with L2 (coupled) weight decay, with
    its sign flipped under ``maximize=True``. Parameters that have no gradient in a step contribute nothing.

    With a learning-rate scheduler, the effective rate is the scheduler's value times the learned scale, and
    ``param_groups[i]["lr"]`` holds the scheduler's own value between steps; ``α`` is then the scale times the highest
    rate that the schedule has reached, so that observations count for less where the schedule has gone down. Without a
    scheduler, ``param_groups[i]["lr"]`` holds the effective rate, and a value that is written there between two steps
    becomes the new ``α``.

    A step whose gradient, norm or dot product is not finite leaves the rate as it was and is counted.

    Args:
        optimizer: Any :class:`torch.optim.Optimizer` whose step is linear in its learning rate.
        rule: ``"additive"``, ``"multiplicative"``, or a :class:`~lightning_hd.Rule` object (which is copied).
        hypergrad_lr: ``β`` of the rule; ``None``: the rule's default.
        scope: ``"global"``: one ``α`` for all parameter groups, whose configured ratios stay as they are (``α`` is the
            largest of their rates; groups all configured at 0 count as equal). ``"group"``: an ``α`` for each.
        min_lr: Lower clamp on the effective learning rate of every group; ``None``: unclamped, as in the paper, and
            the additive rule may go below zero.
        max_lr: Upper clamp; ``None``: unclamped.

    Attributes:
        optimizer: The optimizer.
        scope: ``"global"`` or ``"group"``.
        lrs: The effective learning rate of each parameter group.
        scales: The learned scale of each scope: its rate over the configured one.
        last: What the last step told (:class:`~lightning_hd.Observation`), for each scope.
        step_count: Number of optimizer steps since it was built (or since the run whose state was loaded began).
        nonfinite_steps: Number of steps that left the rate as it was because a number was not finite.
        scheduled: Whether ``param_groups[i]["lr"]`` belongs to a scheduler between steps. ``None``: found out from the
            groups' ``initial_lr``, which all schedulers of ``torch.optim.lr_scheduler`` but ``ReduceLROnPlateau`` set;
            set ``True`` for that one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or has no rate to tune (LBFGS, Rprop, SparseAdam), or another
            argument is of the wrong type. In the first step: a gradient is sparse.
        ValueError: An argument or a configured rate is out of range.
        RuntimeError: The optimizer has a :class:`HypergradientLR` already.

    Example::

        >>> import torch
        >>> from lightning_hd import HypergradientLR
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.01)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     w.square().sum().backward()
        ...     optimizer.step()
        >>> [round(lr, 6) for lr in hd.lrs]
        [0.164]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: str | Rule = "additive",
        hypergrad_lr: float | None = None,
        scope: Literal["global", "group"] = "global",
        min_lr: float | None = 0.0,
        max_lr: float | None = None,
    ) -> None:
        self._rule = check_arguments(rule, hypergrad_lr, scope, min_lr, max_lr)
        check_optimizer(optimizer)
        if optimizer in _attached:
            raise RuntimeError(
                f"this {type(optimizer).__name__} has a HypergradientLR (or a HypergradientDescent callback) already: "
                "use one, or detach() the first"
            )
        self.optimizer = optimizer
        self.step_count = 0
        self.nonfinite_steps = 0
        self.scheduled: bool | None = None
        self.scope = scope
        self._min_lr = -math.inf if min_lr is None else float(min_lr)
        self._max_lr = math.inf if max_lr is None else float(max_lr)
        self._scopes: list[_Scope] = []
        self._groups: list[_Group] = []
        self._anchored_to_scheduler = self._is_scheduled()
        self._step_frame: FrameType | None = None
        self._step: _Step | None = None
        self._warned: set[str] = set()
        self._sync_groups()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    # ------------------------------------------------------------------ what others read

    @property
    def lrs(self) -> list[float]:
        """The effective learning rate of each parameter group: the one that the last step used, or the first will."""
        known = [group.lr for group in self._groups]
        return known + [_get_lr(group) for group in self.optimizer.param_groups[len(known) :]]

    @property
    def scales(self) -> list[float]:
        """The learned scale of each scope: its last rate over the configured one (over 1 where that is 0)."""
        return [scope.used / scope.reference for scope in self._scopes]

    @property
    def last(self) -> list[Observation | None]:
        """What the last step told, for each scope; ``None`` where there was no update before it to judge.

        Its numbers are not finite where that step left the rate as it was for that reason.
        """
        return [scope.last for scope in self._scopes]

    def detach(self, *, keep_state: bool = False) -> None:
        """Remove every hook and buffer, and leave the optimizer as any other.

        ``param_groups[i]["lr"]`` stays as it is between steps: the rate that was reached or, with a scheduler, the
        scheduler's own value, without the learned scale.

        Args:
            keep_state: Leave the ``hd_*`` tensors in ``optimizer.state``, for a checkpoint that is written later.
        """
        self._abandon_step()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self.optimizer)
        if not keep_state:
            for p in [p for p, state in self.optimizer.state.items() if state.keys() & {DIRECTION, DISCOUNTED}]:
                for key in (DIRECTION, DISCOUNTED):
                    self.optimizer.state[p].pop(key, None)
                if not self.optimizer.state[p]:
                    del self.optimizer.state[p]

    def state_dict(self) -> dict[str, Any]:
        """The learned scalars, as plain numbers; the tensors are in ``optimizer.state``, under keys ``hd_*``."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "rule": type(self._rule).__name__,
            "scope": self.scope,
            "step_count": self.step_count,
            "nonfinite_steps": self.nonfinite_steps,
            "scheduled": self._anchored_to_scheduler,
            "scopes": [
                {
                    "lr": scope.lr,
                    "used": scope.used,
                    "reference": scope.reference,
                    "from_zero": scope.from_zero,
                    "started": scope.started,
                    "rule": scope.rule.state_dict(),
                }
                for scope in self._scopes
            ],
            "groups": [
                {
                    "base": group.base,
                    "join": group.join,
                    "weight": group.weight,
                    "lr": group.lr,
                    "direction": None if group.direction is None else group.direction.to_dict(),
                    "moved": [i for i, p in enumerate(settings["params"]) if p in group.moved],
                }
                for group, settings in zip(self._groups, self.optimizer.param_groups, strict=False)
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scalars of :meth:`state_dict`; load the optimizer's own state dict as well, before or after.

        Raises:
            ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, or damaged.
        """
        params = [group["params"] for group in self.optimizer.param_groups]
        own = self.state_dict()
        if not isinstance(state_dict, dict) or not own.keys() <= state_dict.keys():
            raise ValueError("this is not what HypergradientLR.state_dict() returned")
        for key in ("optimizer", "rule", "scope"):
            if state_dict[key] != own[key]:
                raise ValueError(f"the saved state has {key}={state_dict[key]!r}, this HypergradientLR {own[key]!r}")
        try:
            scopes, groups = [], []
            for saved in state_dict["scopes"]:
                values = dict(saved)
                rule = self._rule.bind(is_normalized(self.optimizer))
                rule.load_state_dict(values.pop("rule"))
                scopes.append(_Scope(rule=rule, **values))
            for i, saved in enumerate(state_dict["groups"]):
                values = dict(saved)
                moved = {params[i][j] for j in values.pop("moved")}
                direction = values.pop("direction")
                groups.append(
                    _Group(
                        scope=i if self.scope == "group" else 0,
                        moved=moved,
                        direction=None if direction is None else direction_from_dict(direction),
                        **values,
                    )
                )
            counts = int(state_dict["step_count"]), int(state_dict["nonfinite_steps"])
            scheduled = bool(state_dict["scheduled"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the saved state is damaged or of other parameter groups ({error!r})") from None
        if len(groups) != len(params) or len(scopes) != (len(params) if self.scope == "group" else 1):
            raise ValueError(f"the saved state has {len(groups)} parameter groups, the optimizer {len(params)}")
        self._scopes, self._groups = scopes, groups
        self.step_count, self.nonfinite_steps = counts
        self._anchored_to_scheduler = scheduled
        if not scheduled:
            for group, settings in zip(groups, self.optimizer.param_groups, strict=True):
                group.lr = _set_lr(settings, group.lr)

    # ------------------------------------------------------------------ the optimizer's step hooks

    def _before_step(
        self,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook: tune now where the gradients are there, or right after the closure that computes them."""
        caller = _calling_frame()
        if self._step_frame is not None and _is_within(caller, self._step_frame):
            return None  # a subclass's step calls its parent's: one step, not two
        self._abandon_step()
        self._step_frame = caller
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._tune()
            return None
        if len(args) > 1:
            return (args[0], self._wrap(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._wrap(closure)}

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def tune_after_backward() -> Any:
            loss = closure()
            if self._step is None:  # an optimizer that evaluates its closure twice is tuned once
                self._tune()
            return loss

        return tune_after_backward

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post-hook: runs only when the step really happened."""
        if _calling_frame() is not self._step_frame:
            return
        self._step_frame = None
        if self._step is not None:
            self._finish(self._step)
            self._step = None

    def _abandon_step(self) -> None:
        """Forget a step that began and raised: the rate stays as it was, and the next step has no last direction."""
        self._step_frame = None
        if self._step is not None:
            for settings, group in zip(self.optimizer.param_groups, self._step.groups, strict=False):
                if _get_lr(settings) == group.lr:
                    _set_lr(settings, group.restore)
            self._step = None

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def _tune(self) -> None:
        """The gradients are there: observe, set the rates, keep what the directions will need."""
        # A fused optimizer under a GradScaler unscales inside of its step, and skips it where an inf was found.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return
        self._sync_groups()
        observations = [self._observe(i) for i in range(len(self._scopes))]
        rates = [self._next_rate(scope, seen) for scope, seen in zip(self._scopes, observations, strict=True)]
        if self._anchored_to_scheduler:
            rates = self._follow_schedule(rates)
        self._step = _Step(rates, observations)
        try:
            for group, settings in zip(self._groups, self.optimizer.param_groups, strict=True):
                self._set_out(group, settings, self._step)
        except BaseException:
            self._abandon_step()
            raise

    def _observe(self, scope: int) -> Observation | None:
        """The hypergradient of one scope, from the last step's directions and this step's gradients."""
        parts, weights = [], []
        directions = 0
        for group, settings in zip(self._groups, self.optimizer.param_groups, strict=True):
            for p in settings["params"] if group.scope == scope else ():
                if p.grad is not None:
                    d = self._last_direction(group, p)
                    directions += d is not None
                    parts.append(products(self._gradient(settings, p), d))
                    weights.append(1.0 if self._rule.long_horizon else group.weight)
        if not directions:
            return None
        dot, g_squared, d_squared = totals(parts, weights)
        measured = [group.direction for group in self._groups if isinstance(group.direction, Measured)]
        if d_squared == 0 < g_squared and any(direction.lr for direction in measured):
            self._warn(
                "vanished step",
                "the last step vanished in the rounding of the parameters, so its direction is unknown and the "
                "learning rate stays as it is: start from a larger one, or from 0",
            )
        return Observation(-dot, math.sqrt(g_squared), math.sqrt(d_squared))

    def _last_direction(self, group: _Group, p: Tensor) -> Tensor | None:
        """``d_{t-1}`` of one parameter, or ``D_{t-1}``; ``None`` where the last step did not move it."""
        state: dict[str, Any] = self.optimizer.state.get(p, {})
        if self._rule.long_horizon:
            return state.get(DISCOUNTED)
        if group.direction is None or p not in group.moved:
            return None
        try:
            return group.direction.read(p, state)
        except KeyError:
            self._warn(
                "lost direction",
                "the optimizer's state has lost the last direction (was it loaded from a checkpoint written without "
                "it?); the learning rate stays as it is for one step",
            )
            return None

    def _gradient(self, settings: dict[str, Any], p: Tensor) -> Tensor:
        return objective_gradient(self.optimizer, settings, p, getattr(self.optimizer, "grad_scale", None))

    def _next_rate(self, scope: _Scope, seen: Observation | None) -> tuple[float, float]:
        """``α_t`` and ``γ_t``; the last ones where a number is not finite."""
        step = self.step_count + 1
        low, high = self._range(scope)
        lr = scope.lr
        if seen is not None:
            if not all(map(math.isfinite, seen)):
                return self._stay(scope, f"(hypergradient, ‖g‖, ‖d‖) = {tuple(seen)}")
            lr = _returned(scope.rule.update(lr, seen, step), scope.rule, "update")
        used = _returned(scope.rule.used(lr, step), scope.rule, "used")
        if not (math.isfinite(lr) and math.isfinite(used)):
            return self._stay(scope, f"the rate that {type(scope.rule).__name__} made of {seen}")
        lr = min(max(lr, low), high)
        return lr, min(max(_returned(scope.rule.used(lr, step), scope.rule, "used"), low), high)

    def _stay(self, scope: _Scope, what: str) -> tuple[float, float]:
        self.nonfinite_steps += 1
        self._warn(
            "not finite",
            f"step {self.step_count + 1}: not a finite number in {what}; the learning rate stays at {scope.used:g}. "
            "Further such steps are counted in nonfinite_steps",
        )
        return scope.lr, scope.used

    def _set_out(self, group: _Group, settings: dict[str, Any], step: _Step) -> None:
        """Give one group its rate, and keep what is needed to know its direction afterwards."""
        scope = self._scopes[group.scope]
        weight = group.base * group.join / scope.reference
        restore, lr = _get_lr(settings), self._effective(group, step.rates[group.scope][1])
        unknown = lr == 0 and isinstance(direction_of(self.optimizer, settings, lr), Measured)
        probed = weight != 0 and (unknown or (scope.rule.picks_start and not scope.started))
        lr = _set_lr(settings, _PROBE if probed else lr)
        direction = direction_of(self.optimizer, settings, lr)
        moved = [p for p in settings["params"] if p.grad is not None]
        step.groups.append(_GroupStep(restore, lr, weight, direction, moved, probed))
        group.moved = set()  # their directions are overwritten here, and known again once the step is done
        for p in moved:
            g = self._gradient(settings, p)
            if direction.copies:
                copy = self.optimizer.state.get(p, {}).get(DIRECTION)
                step.kept[p] = torch.empty_like(p) if copy is None else copy
                direction.keep(step.kept[p], p, g)
            if probed:
                step.before[p] = p.clone(memory_format=torch.preserve_format)

    @torch.no_grad()
    def _finish(self, step: _Step) -> None:
        """The parameters have moved: take over the rates and learn the directions."""
        self.step_count += 1
        for scope, (lr, used), seen in zip(self._scopes, step.rates, step.observations, strict=True):
            scope.lr, scope.used, scope.last = lr, used, seen
        state = self.optimizer.state
        for group in step.groups:
            for p in group.moved:
                if p in step.kept:
                    group.direction.settle(step.kept[p], p, state[p])
                    state[p][DIRECTION] = step.kept[p]
        if any(group.probed for group in step.groups):
            self._rescale(step)
        for known, group in zip(self._groups, step.groups, strict=True):
            known.lr, known.weight, known.direction, known.moved = (
                group.lr,
                group.weight,
                group.direction,
                set(group.moved),
            )
            if group.moved:
                self._scopes[known.scope].started = True
        if self._rule.long_horizon:
            self._discount(step)
        if self._anchored_to_scheduler:
            for settings, group in zip(self.optimizer.param_groups, step.groups, strict=True):
                _set_lr(settings, group.restore)

    def _rescale(self, step: _Step) -> None:
        """Replace steps at the rate of the probe by steps at the rate that they should have had."""
        state = self.optimizer.state
        for i, scope in enumerate(self._scopes):
            if scope.rule.picks_start and not scope.started:
                members = [g for known, g in zip(self._groups, step.groups, strict=True) if known.scope == i]
                d_squared = sum(
                    float(squared_norm(g.direction.read(p, state[p]))) * g.weight**2 for g in members for p in g.moved
                )
                p_squared = sum(float(squared_norm(step.before[p])) for g in members for p in g.moved if g.probed)
                start = _returned(scope.rule.start(math.sqrt(p_squared), math.sqrt(d_squared)), scope.rule, "start")
                low, high = self._range(scope)
                scope.lr = scope.used = min(max(start, low), high)
        for known, group, settings in zip(self._groups, step.groups, self.optimizer.param_groups, strict=True):
            if not group.probed:
                continue
            group.lr = _set_lr(settings, self._effective(known, self._scopes[known.scope].used))
            for p in group.moved:
                d = group.direction.read(p, state[p])
                p.copy_(step.before[p])
                if group.lr:
                    as_real(p).copy_(widen(as_real(p)).sub(d, alpha=group.lr))
            group.direction = direction_of(self.optimizer, settings, group.lr)

    def _discount(self, step: _Step) -> None:
        """``D_t = μ_t D_{t-1} + d_t``, each direction weighted as its group's rate follows the scope's."""
        for known, group, settings in zip(self._groups, step.groups, self.optimizer.param_groups, strict=True):
            discount = self._scopes[known.scope].rule.discount(self.step_count)
            for p in settings["params"]:
                state = self.optimizer.state.get(p, {})
                if DISCOUNTED in state:
                    state[DISCOUNTED].mul_(discount)
            for p in group.moved:
                state = self.optimizer.state[p]
                d = group.direction.read(p, state)
                if DISCOUNTED not in state:
                    state[DISCOUNTED] = torch.zeros_like(as_real(p))
                state[DISCOUNTED].add_(d, alpha=group.weight)
                state.pop(DIRECTION, None)

    # ------------------------------------------------------------------ rates of groups and scopes

    def _is_scheduled(self) -> bool:
        if self.scheduled is not None:
            return self.scheduled
        return any("initial_lr" in settings for settings in self.optimizer.param_groups)

    def _sync_groups(self) -> None:
        """Take over what others did since the last step: rates written, groups added, a scheduler built or stepped."""
        settings = self.optimizer.param_groups
        new = range(len(self._groups), len(settings))
        stale: set[int] = set()
        if self._is_scheduled() != self._anchored_to_scheduler:
            self._anchored_to_scheduler = self._is_scheduled()
            stale.update(range(len(self._scopes)))
        for i in new:
            group = _Group(scope=i if self.scope == "group" else 0, lr=_get_lr(settings[i]))
            if group.scope == len(self._scopes):
                self._scopes.append(_Scope(self._rule.bind(is_normalized(self.optimizer))))
                stale.add(group.scope)
            elif group.scope not in stale:
                self._join(group)
            self._groups.append(group)
        for group, group_settings in zip(self._groups, settings, strict=True):
            if self._anchored_to_scheduler:
                group.base = _get_lr(group_settings)
            elif _get_lr(group_settings) != group.lr:
                stale.add(group.scope)
        for i in stale:
            self._anchor(i)

    def _anchor(self, index: int) -> None:
        """Start a scope from the rates that its groups are configured with now."""
        scope = self._scopes[index]
        members = [
            (i, group, settings)
            for i, (group, settings) in enumerate(zip(self._groups, self.optimizer.param_groups, strict=True))
            if group.scope == index
        ]
        configured = []
        for i, _, settings in members:
            lr = _get_lr(settings)
            lr = float(settings.get("initial_lr", lr)) if self._anchored_to_scheduler else lr
            if not math.isfinite(lr) or lr < 0 <= self._min_lr:
                allowed = "a finite number" + ("" if self._min_lr < 0 else " of at least 0 (or pass min_lr=None)")
                raise ValueError(f"lr of {type(self.optimizer).__name__} param_groups[{i}] must be {allowed}, got {lr}")
            configured.append(lr)
        reference = max(configured, key=abs)
        scope.from_zero = reference == 0
        if scope.from_zero and self._anchored_to_scheduler:
            self._warn(
                "zero schedule", "a scheduler multiplies the configured learning rate, which is 0: the product stays 0"
            )
        scope.reference = 1.0 if scope.from_zero else reference
        scope.lr = scope.used = 0.0 if scope.from_zero and not self._anchored_to_scheduler else scope.reference
        if not scope.rule.picks_start and not scope.started:
            scope.rule.check_start(scope.lr)
        for _, group, settings in members:
            group.lr = group.base = _get_lr(settings)
            group.join = 1.0
            if scope.from_zero and not self._anchored_to_scheduler:
                group.base = 1.0

    def _follow_schedule(self, rates: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Let the references, and the rates with them, rise with a schedule: the rule works on the rate at its peak."""
        growth = [1.0] * len(rates)
        for group in self._groups:
            scope = self._scopes[group.scope]
            growth[group.scope] = max(growth[group.scope], abs(group.base * group.join / scope.reference))
        for scope, factor in zip(self._scopes, growth, strict=True):
            scope.reference *= factor
            scope.lr *= factor
            scope.used *= factor
        return [(lr * factor, used * factor) for (lr, used), factor in zip(rates, growth, strict=True)]

    def _join(self, group: _Group) -> None:
        """Let a group that was added in mid-training join a scope at its configured rate."""
        scope = self._scopes[group.scope]
        group.base = group.lr
        if scope.used:
            group.join = scope.reference / scope.used
        elif scope.from_zero:
            group.base = 1.0

    def _effective(self, group: _Group, used: float) -> float:
        """The group's rate where the scope's is ``used``."""
        scope = self._scopes[group.scope]
        configured = group.base * group.join
        lr = used if configured == scope.reference else configured * (used / scope.reference)
        return min(max(lr, self._min_lr), self._max_lr)

    def _range(self, scope: _Scope) -> tuple[float, float]:
        """Where the scope's rate can be without all of its groups being clamped."""
        weights = [
            abs(group.base * group.join / scope.reference)
            for group in self._groups
            if self._scopes[group.scope] is scope and group.base
        ]
        if not weights:
            return -math.inf, math.inf
        low = self._min_lr / max(weights)
        if self._anchored_to_scheduler and self._min_lr > 0:
            low = 0.0  # a schedule that goes to 0 must not drive the scale up
        return low, self._max_lr / min(weights)

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind of thing, on rank zero."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if kind not in self._warned and not (distributed and torch.distributed.get_rank()):
            warnings.warn(f"HypergradientLR({type(self.optimizer).__name__}): {message}", RuntimeWarning, stacklevel=2)
        self._warned.add(kind)


def check_arguments(
    rule: str | Rule, hypergrad_lr: float | None, scope: str, min_lr: float | None, max_lr: float | None
) -> Rule:
    """The rule that is asked for, once all arguments are found to be in order.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """
    if scope not in ("global", "group"):
        raise ValueError(f"scope must be 'global' or 'group', got {scope!r}")
    low = -math.inf if min_lr is None else check_number("min_lr", min_lr)
    high = math.inf if max_lr is None else check_number("max_lr", max_lr)
    if low > high:
        raise ValueError(f"min_lr must not be above max_lr, got min_lr={min_lr!r} and max_lr={max_lr!r}")
    return make_rule(rule, hypergrad_lr)


def _returned(value: Any, rule: Rule, method: str) -> float:
    """What a rule's method returned, as a float."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(rule).__name__}.{method} must return a number, got {value!r}")
    return float(value)


def _get_lr(settings: dict[str, Any]) -> float:
    return float(settings["lr"])


def _set_lr(settings: dict[str, Any], lr: float) -> float:
    """Write a group's rate, in place where it is a tensor; returns what the group then holds."""
    if _get_lr(settings) != lr:
        if isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(lr)
        else:
            settings["lr"] = lr
    return _get_lr(settings)


def _calling_frame() -> FrameType | None:
    """The frame that called the step hook that calls this."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    return frame


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False
