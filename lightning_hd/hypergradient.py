"""HypergradientLR: attached to one torch optimizer; gradients and directions in, learning rate out."""

import inspect
import logging
import math
import warnings
from collections.abc import Container
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.checkpoints import keep_tensors
from lightning_hd.directions import (
    DIRECTION,
    DISCOUNTED,
    Direction,
    Measured,
    check_gradient,
    check_optimizer,
    direction_from_dict,
    direction_of,
    objective_gradient,
    unwrap,
)
from lightning_hd.hooks import StepHooks
from lightning_hd.rates import Rates, Scope, get_lr, set_lr
from lightning_hd.reduction import Ranks, as_real, local, products, shards, squared_norm, totals, widen
from lightning_hd.rules import Observation, Rule, check_count, check_number, make_rule

_LARGEST = torch.finfo(torch.float32).max
"""The largest rate that torch multiplies with."""

_log = logging.getLogger(__name__)


@dataclass
class _Last:
    """The last step of one parameter group."""

    weight: float = 0.0  # derivative of the group's rate with respect to the scope's
    direction: Direction | None = None
    moved: set[Tensor] = field(default_factory=set)  # the parameters that were updated


@dataclass
class _GroupStep:
    """One parameter group during a call of ``optimizer.step``."""

    lr: float  # what param_groups[i]["lr"] holds during the update
    weight: float
    direction: Direction
    moved: list[Tensor]
    probed: bool  # the step is taken at a rate for trial, and rescaled afterwards
    discount: float  # μ_t, for a rule with a long horizon


@dataclass
class _Step:
    """One call of ``optimizer.step``, from when the gradients are there until the parameters have moved."""

    rules: list[dict[str, Any]]  # what the rules held before
    restore: list[float]  # what param_groups[i]["lr"] held before
    observations: list[Observation | None] = field(default_factory=list)
    has_gradient: list[bool] = field(default_factory=list)  # whether a parameter of the scope has one, on any rank
    rates: list[tuple[float, float]] = field(default_factory=list)  # α_t and γ_t of each scope
    finite: bool = True
    groups: list[_GroupStep] = field(default_factory=list)
    kept: dict[Tensor, Tensor] = field(default_factory=dict)  # what the directions need once the update is done
    before: dict[Tensor, Tensor] = field(default_factory=dict)  # θ_{t-1}, for probed groups


class HypergradientLR:
    r"""Tunes the learning rate of an optimizer by hypergradient descent, in any training loop.

    After it is built, ``loss.backward(); optimizer.step()`` needs no other change. Around every step, between the
    backward pass and the update, the learning rate ``α`` follows the derivative of the loss with respect to it,

    .. math:: h_t = \frac{\partial f(\theta_{t-1})}{\partial \alpha} = -g_t \cdot d_{t-1},

    ``g_t`` being the new gradient and ``d_{t-1}`` the direction of the last update, ``θ_{t-1} = θ_{t-2} - α d_{t-1}``.
    The default rule (:class:`~lightning_hd.Auto`) takes it with respect to all steps of a long horizon.
    Source: "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin et al., ICLR 2018, arXiv 1703.04782),
    Section 3.

    Each step passes two or three times over gradients and directions. The default rule keeps one buffer of the
    parameters' shape, in float32 at least, and holds a second one during a step of optimizers that
    :mod:`lightning_hd.directions` keeps a copy for. The paper's rules keep that copy only: for SGD without momentum,
    Nesterov's, ASGD, and optimizers whose directions are measured.

    ``g_t`` is the gradient that the optimizer sees: after clipping and unscaling, with L2 (coupled) weight decay, with
    its sign flipped under ``maximize=True``. (Step hooks run in the order in which they are registered: one that
    changes gradients must come before this.) Parameters that have no gradient in a step contribute nothing, and a step
    without any gradient is none; nor is a first one at a rate of 0 with gradients of 0, by which
    ``torch.distributed.checkpoint`` has an optimizer make its state.

    With a learning-rate scheduler, the effective rate is the scheduler's value times the learned scale, and
    ``param_groups[i]["lr"]`` holds the scheduler's own value between steps; ``α`` is then the scale times the highest
    rate that the schedule has reached (the configured one at least), so that observations count for less where the
    schedule has gone down. A rule that picks its own first rate, as the default does, needs no warm-up: the configured
    rate does not count, and where a schedule rises to a new height, the scale is lowered for ``α`` to stay the same.
    Without a scheduler, ``param_groups[i]["lr"]`` holds the effective rate, and a value that is written there between
    two steps becomes the new ``α``.

    A step whose gradient, norm or dot product is not finite leaves the rate as it was and is counted.

    Args:
        optimizer: Any :class:`torch.optim.Optimizer` whose step is linear in its learning rate.
        rule: ``"auto"`` (:class:`~lightning_hd.Auto`), ``"additive"`` or ``"multiplicative"`` (the paper's), or a
            :class:`~lightning_hd.Rule` object (which is copied).
        hypergrad_lr: ``β`` of the paper's rules; ``None``: the rule's default.
        scope: ``"global"``: one ``α`` for all parameter groups, whose configured ratios stay as they are (``α`` is the
            largest of their rates; groups all configured at 0 count as equal). ``"group"``: an ``α`` for each.
        min_lr: Lower clamp on the effective learning rate of every group; ``None``: unclamped, as in the paper, and
            the additive rule may go below zero.
        max_lr: Upper clamp; ``None``: unclamped.
        process_group: The processes that train this model together, each with a copy (DDP) or with shards (DTensor
            parameters, as of ``fully_shard`` and tensor parallelism): hypergradients are summed over them, in one
            ``all_reduce`` a step, and the rates are equal bit for bit. ``None``: the default group, where
            ``torch.distributed`` is initialized; for models that train apart, give each a group of its own.

    Attributes:
        optimizer: The optimizer.
        scope: ``"global"`` or ``"group"``.
        lrs: The effective learning rate of each parameter group.
        scales: The learned scale of each scope: its effective rate over the configured or, with a scheduler, the
            scheduled one (over 1 where it is configured at 0).
        last: What the last step told (:class:`~lightning_hd.Observation`), for each scope.
        step_count: Number of optimizer steps since it was built (or since the run whose state was loaded began).
        brakes: How often the rule of each scope has backed off from an overshoot. Each time is told to the logger
            ``lightning_hd.hypergradient``, at the level INFO.
        nonfinite_steps: Number of steps that left the rate as it was because a number was not finite.
        paused: While ``True``, steps are left alone: neither tuned nor counted. Settable.
        scheduled: Whether ``param_groups[i]["lr"]`` belongs to a scheduler between steps. ``None``: found out from the
            groups' ``initial_lr``, which all schedulers of ``torch.optim.lr_scheduler`` but ``ReduceLROnPlateau`` set;
            set it to ``True`` for that one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or has no rate to tune (LBFGS, Rprop, SparseAdam), or another
            argument is of the wrong type. In the first step: a gradient is sparse, or the optimizer moves the
            parameters before it evaluates its closure (SAM).
        ValueError: An argument or a configured rate is out of range, or ``process_group`` lacks processes that hold
            shards of the parameters.
        RuntimeError: The optimizer has a :class:`HypergradientLR` already. In the first step: the processes do not
            tune the same (on every one of them).

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
        rule: Rule | str = "auto",
        hypergrad_lr: float | None = None,
        scope: Literal["global", "group"] = "global",
        min_lr: float | None = 0.0,
        max_lr: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._rule, low, high = check_arguments(rule, hypergrad_lr, scope, min_lr, max_lr)
        check_optimizer(optimizer)
        self._ranks = Ranks(process_group)
        self._ranks.check_meshes(p for settings in optimizer.param_groups for p in settings["params"])
        self._compared = False
        self.optimizer = unwrap(optimizer)
        self.scope = scope
        self.step_count = 0
        self.nonfinite_steps = 0
        self.paused = False
        self._rates = Rates(self.optimizer, self._rule, scope, low, high)
        self._last = [_Last() for _ in self._rates.groups]
        self._step: _Step | None = None
        self._dry = False
        self._without_schedule = False  # whether a state was loaded that knew of none, where there is one
        self._warned: set[str] = set()
        self._hooks: StepHooks | None = None
        self._loading: list[RemovableHandle] = []
        self._attach()

    # ------------------------------------------------------------------ what others read

    @property
    def lrs(self) -> list[float]:
        """The effective learning rate of each parameter group: the one that the last step used."""
        known = [group.lr for group in self._rates.groups]
        return known + [get_lr(settings) for settings in self.optimizer.param_groups[len(known) :]]

    @property
    def scales(self) -> list[float]:
        """The learned scale of each scope: the effective rate over the configured or scheduled one."""
        return [scope.scale for scope in self._rates.scopes]

    @property
    def brakes(self) -> list[int]:
        """How often the rule of each scope has backed off from an overshoot."""
        return [scope.rule.brakes for scope in self._rates.scopes]

    @property
    def last(self) -> list[Observation | None]:
        """What the last step told, for each scope; ``None`` where there was no update before it to judge.

        Its numbers are not finite where that step left the rate as it was for that reason.
        """
        return [scope.last for scope in self._rates.scopes]

    @property
    def scheduled(self) -> bool | None:
        """Whether a scheduler owns ``param_groups[i]["lr"]`` between steps; ``None``: found out from the groups."""
        return self._rates.scheduled

    @scheduled.setter
    def scheduled(self, value: bool | None) -> None:
        self._rates.scheduled = None if value is None else bool(value)

    @property
    def attached(self) -> bool:
        """Whether the optimizer is being tuned: from the beginning until :meth:`detach`."""
        return self._hooks is not None

    def detach(self, *, keep_state: bool = False) -> None:
        """Remove every hook and buffer, and leave the optimizer as any other.

        ``param_groups[i]["lr"]`` stays as it is between steps: the rate that was reached or, with a scheduler, the
        scheduler's own value, without the learned scale.

        Args:
            keep_state: Leave the ``hd_*`` tensors in ``optimizer.state``, for a checkpoint that is written later.
        """
        self._abandon_step()
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None
        for handle in self._loading:
            handle.remove()
        self._loading = []
        if not keep_state:
            self._drop_tensors()

    def _drop_tensors(self, without: Container[Tensor] = ()) -> bool:
        """Remove the tensors of the engine; returns whether there were any but those that :meth:`_make_room` made."""
        found = False
        for p, state in list(self.optimizer.state.items()):
            if isinstance(state, dict) and state.keys() & {DIRECTION, DISCOUNTED} and p not in without:
                for key in state.keys() & {DIRECTION, DISCOUNTED}:
                    found |= bool(local(state.pop(key)).any())
                if not state:
                    del self.optimizer.state[p]
        return found

    def state_dict(self) -> dict[str, Any]:
        """The learned scalars, as plain numbers; the tensors are in ``optimizer.state``, under keys ``hd_*``."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "rule": type(self._rule).__name__,
            "scope": self.scope,
            "step_count": self.step_count,
            "nonfinite_steps": self.nonfinite_steps,
            "rates": self._rates.state_dict(),
            "last": [
                {
                    "weight": last.weight,
                    "direction": None if last.direction is None else last.direction.to_dict(),
                    "moved": [i for i, p in enumerate(settings["params"]) if p in last.moved],
                }
                for last, settings in zip(self._last, self.optimizer.param_groups, strict=False)
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scalars of :meth:`state_dict`; load the optimizer's own state dict as well, before or after.

        Raises:
            ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, or damaged.
        """
        self._sync()
        own = self.state_dict()
        if not isinstance(state_dict, dict) or not own.keys() <= state_dict.keys():
            raise ValueError("this is not what HypergradientLR.state_dict() returned")
        for key in ("optimizer", "rule", "scope"):
            if state_dict[key] != own[key]:
                raise ValueError(
                    f"the saved state has {key}={state_dict[key]!r}, this HypergradientLR {own[key]!r}: go on with the "
                    "same, or load the parameters only"
                )
        saved_last = state_dict["last"]
        if isinstance(saved_last, list) and len(saved_last) != len(self._last):
            raise ValueError(f"the saved state has {len(saved_last)} parameter groups, the optimizer {len(self._last)}")
        try:
            last = [
                _Last(
                    check_number("weight", saved["weight"]),
                    None if saved["direction"] is None else direction_from_dict(saved["direction"]),
                    {settings["params"][check_count("moved", i)] for i in saved["moved"]},
                )
                for saved, settings in zip(saved_last, self.optimizer.param_groups, strict=True)
            ]
            counts = {name: check_count(name, state_dict[name]) for name in ("step_count", "nonfinite_steps")}
            scheduled = self._rates.under_schedule
            self._rates.load_state_dict(state_dict["rates"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the saved state is damaged, or of other parameter groups: {error!r}") from error
        self._without_schedule = scheduled and not self._rates.under_schedule
        self._last = last
        vars(self).update(counts)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": self.attached, "_loading": [], "_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_hooks")
        vars(self).update(state, _hooks=None)
        if attached:  # torch leaves the hooks behind when it copies an optimizer
            self._attach()

    def _attach(self) -> None:
        self._hooks = StepHooks(self.optimizer, self._begin, self._prepare, self._finish)
        self._loading = keep_tensors(self.optimizer)

    # ------------------------------------------------------------------ one step

    def _begin(self) -> bool:
        """A step begins: whether it is to be tuned."""
        self._abandon_step()
        self._dry = False
        if self.paused:
            for last in self._last:
                last.moved = set()  # it is not known what this step does to their directions
            return False
        return True

    @torch.no_grad()
    def _prepare(self) -> bool:
        """The gradients are there: prepare the update, or leave all as it was. Returns which."""
        # A fused optimizer under a GradScaler unscales inside of its step, and skips it where an inf was found: the
        # scaler tells it so by these two attributes, which exist during the step only.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return False
        error = self._error()
        self._dry = self._is_dry(error)
        if self._dry:
            return False
        self._compare(error)
        if error is not None:
            raise error
        try:
            return self._tune()
        except BaseException:
            self._abandon_step()
            raise

    def _error(self) -> Exception | None:
        """What is wrong with the rates or the gradients."""
        try:
            if not self.step_count:
                self._rates.check()
            for settings in self.optimizer.param_groups:
                for p in settings["params"]:
                    check_gradient(p)
        except (TypeError, ValueError) as error:
            return error
        return None

    def _is_dry(self, error: Exception | None) -> bool:
        """Whether this is the dry step by which ``torch.distributed.checkpoint`` makes a fresh optimizer's state.

        That is before the first step, with all rates and all gradients set to 0. One rank may do so alone, unless it
        has shards.
        """
        if self.step_count:
            return False
        params = [p for settings in self.optimizer.param_groups for p in settings["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        live = (
            error is not None
            or any(map(get_lr, self.optimizer.param_groups))
            or (not gradients and any(p.requires_grad for p in params))
            or any(bool(local(g).any()) for g in gradients)
        )
        if any(isinstance(p, DTensor) for p in params):
            live = bool(self._ranks.sum(self._zeros(1) + live).item())
        return not live

    def _make_room(self) -> None:
        """Make the tensors that are saved, where the optimizer has made its own state."""
        for settings in self.optimizer.param_groups:
            copies = direction_of(self.optimizer, settings, 0.0).copies
            for p in settings["params"]:
                if p.grad is not None and self._rule.long_horizon:
                    self.optimizer.state[p][DISCOUNTED] = widen(torch.zeros_like(as_real(p.detach())))
                elif p.grad is not None and copies:
                    self.optimizer.state[p][DIRECTION] = torch.zeros_like(p.detach())

    def _abandon_step(self) -> None:
        """Forget a step that began and raised: the rate stays as it was, and the next step has no last direction."""
        step, self._step = self._step, None
        if step is None:
            return
        for scope, rule in zip(self._rates.scopes, step.rules, strict=True):
            scope.rule.load_state_dict(rule)
        holding = [get_lr(settings) for settings in self.optimizer.param_groups]
        for settings, group, restore, lr in zip(
            self.optimizer.param_groups, step.groups, step.restore, holding, strict=False
        ):
            if lr == group.lr:
                set_lr(settings, restore)
            elif self._rates.under_schedule:
                self._warn(
                    "schedule",
                    "a step raised an error, and the scheduler went on from the rate of that step: its values may be "
                    "off from here on",
                )

    def _tune(self) -> bool:
        """Observe, set the rates, keep what the directions will need; ``False`` where no rank has a gradient."""
        groups = self.optimizer.param_groups
        with_gradient = [[p for p in settings["params"] if p.grad is not None] for settings in groups]
        if not any(with_gradient) and (self._ranks.count == 1 or not any(settings["params"] for settings in groups)):
            return False
        if not self.step_count and self._drop_tensors():  # whoever goes on with them has loaded the step count as well
            self._warn(
                "fresh start",
                "the optimizer's state has directions of a former run, but load_state_dict() was not called: tuning "
                "starts from the beginning",
            )
        self._sync()
        if self._without_schedule and self._rates.under_schedule:
            self._warn(
                "new schedule",
                "the saved state is of a training without a scheduler: the learned scale starts anew from what the "
                "scheduler says",
            )
        self._without_schedule = False
        rules = [scope.rule.state_dict() for scope in self._rates.scopes]
        step = self._step = _Step(rules, restore=[get_lr(settings) for settings in groups])
        self._observe(step)
        if not any(step.has_gradient):
            self._step = None
            return False
        step.rates = [self._next_rate(step, i) for i in range(len(self._rates.scopes))]
        if self._rates.under_schedule and all(scope.from_zero for scope in self._rates.scopes):
            self._warn(
                "zero schedule",
                "the scheduled learning rate is 0, and no scale changes that: unless it rises, nothing is learned",
            )
        for i, (lr, weight) in enumerate(self._rates.effective([used for _, used in step.rates])):
            self._set_out(step, i, with_gradient[i], lr, weight)
        return True

    def _sync(self) -> None:
        """Take over what others did since the last step."""
        self._rates.sync()
        own = {p for settings in self.optimizer.param_groups for p in settings["params"]}
        if not own.issuperset(self.optimizer.state):
            self._drop_tensors(without=own)
        self._last += [_Last() for _ in self._rates.groups[len(self._last) :]]

    def _compare(self, error: Exception | None) -> None:
        """Before the first step: raise on all ranks where they do not tune the same, rather than wait forever."""
        if self._compared or self._ranks.count == 1:
            return
        own = {
            "error": error and repr(error),
            "optimizer": type(self.optimizer).__name__,
            "rule": (type(self._rule).__name__, _plain(vars(self._rule))),
            "scope": self.scope,
            "min_lr, max_lr": self._rates.limits,
            "step_count": self.step_count,
            "lrs": [str(settings["lr"]) if error else get_lr(settings) for settings in self.optimizer.param_groups],
            "shapes of parameters": [
                [tuple(p.shape) for p in settings["params"]] for settings in self.optimizer.param_groups
            ],
            "what was learned": _plain(self._rates.state_dict()["scopes"]),
        }
        for rank, other in enumerate(everyone := self._ranks.gather(own)):
            for key, value in other.items():
                if value != everyone[0][key]:
                    raise RuntimeError(
                        f"HypergradientLR({own['optimizer']}): the processes do not tune the same: {key} is "
                        f"{everyone[0][key]} on rank 0 and {value} on rank {rank}. Give models that train apart a "
                        "process_group each"
                    )
        self._compared = True

    def check_agreement(self) -> None:
        """Compare the learning rates of all processes of the group; to be called on each of them.

        Raises:
            RuntimeError: They are not equal bit for bit, which must not happen: on every process.
        """
        everyone = self._ranks.gather((self.step_count, self.lrs))
        if any(other != everyone[0] for other in everyone):
            raise RuntimeError(
                f"HypergradientLR({type(self.optimizer).__name__}): internal error: the (step, learning rates) of the "
                f"processes differ: {everyone}"
            )

    def _observe(self, step: _Step) -> None:
        """The hypergradient of each scope, from the last step's directions and this step's gradients."""
        sums = torch.stack([self._sums(i) for i in range(len(self._rates.scopes))])
        for scope, (dot, g_squared, d_squared, has_gradient, known, measured) in zip(
            self._rates.scopes, self._ranks.sum(sums).tolist(), strict=True
        ):
            step.has_gradient.append(bool(has_gradient))
            step.observations.append(Observation(-dot, math.sqrt(g_squared), math.sqrt(d_squared)) if known else None)
            if known and measured and d_squared == 0 < g_squared and (scope.last is None or scope.last.grad_norm > 0):
                if scope.on_trial:
                    scope.enlarge_trial()
                else:
                    self._warn(
                        "vanished step",
                        "the last step vanished in the rounding of the parameters, so its direction is unknown and the "
                        "learning rate stays as it is: start from a larger one, or from 0",
                    )

    def _sums(self, scope: int) -> Tensor:
        """This rank's part of one scope, of shape (6,).

        ``g·d``, ``‖g‖²``, ``‖d‖²``, and whether there is a ``g``, a ``d`` is known, and was measured where there was a
        step.
        """
        parts, weights, copies = [], [], []
        known = measured = False
        for i in self._rates.members(scope):
            last, settings = self._last[i], self.optimizer.param_groups[i]
            if last.moved and isinstance(last.direction, Measured):
                measured |= last.direction.lr * last.weight != 0
            for p in settings["params"]:
                if p.grad is not None:
                    d = self._last_direction(last, p)
                    known |= d is not None
                    parts.append(products(self._gradient(settings, p), d))
                    weights.append(1.0 if self._rule.long_horizon else last.weight)
                    copies.append(self._copies(p))
        sums = self._zeros(6)
        if parts:
            flags = parts[0].new_tensor([True, known, measured])
            sums += torch.cat([totals(parts, weights, copies), flags]).to(sums.device)
        return sums

    def _zeros(self, size: int) -> Tensor:
        """Where sums are accumulated, for all ranks: on one device, in the widest dtype that it has."""
        device = next(p.device for settings in self.optimizer.param_groups for p in settings["params"])
        return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def _copies(self, p: Tensor) -> float:
        """On how many ranks the same elements of a parameter are."""
        return self._ranks.count / shards(p)

    def _last_direction(self, last: _Last, p: Tensor) -> Tensor | None:
        """``d_{t-1}`` of one parameter, or ``D_{t-1}``; ``None`` where the last step did not move it."""
        state: dict[str, Any] = self.optimizer.state.get(p, {})
        d: Tensor | None = None
        lost = False
        if self._rule.long_horizon:
            d = state.get(DISCOUNTED)
            lost = d is None and p in last.moved
        elif last.direction is not None and p in last.moved:
            try:
                d = last.direction.read(p, state)
            except KeyError:
                lost = True
        fits = d is not None and d.shape == as_real(p).shape
        if lost or (d is not None and not fits):
            self._warn(
                "lost direction",
                "the optimizer's state has lost the last direction (was it loaded from a checkpoint written without "
                "it?); the learning rate stays as it is for one step",
            )
        return d if fits else None

    def _gradient(self, settings: dict[str, Any], p: Tensor) -> Tensor:
        g = objective_gradient(self.optimizer, settings, p, getattr(self.optimizer, "grad_scale", None))
        if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
            g = g.redistribute(placements=p.placements)
        return g

    def _next_rate(self, step: _Step, index: int) -> tuple[float, float]:
        """``α_t`` and ``γ_t`` of a scope; the last ones where a number is not finite."""
        scope, seen, number = self._rates.scopes[index], step.observations[index], self.step_count + 1
        lr = scope.lr
        finite = seen is None or all(map(math.isfinite, seen))
        brakes = scope.rule.brakes
        if seen is not None and finite:
            lr = _returned(scope.rule.update(lr, seen, number), scope.rule, "update")
        lr *= self._rates.follow_schedule(index)
        if not finite:
            self._forget(index, seen)
            return self._stay(step, scope, f"(hypergradient, ‖g‖, ‖d‖) = {tuple(seen or ())}")
        if abs(lr) <= _LARGEST:
            lr = self._rates.clamp(index, lr)
            used = _returned(scope.rule.used(lr, number), scope.rule, "used")
            if abs(used) <= _LARGEST:
                if seen is not None and scope.rule.brakes > brakes:
                    self._tell_of_brake(seen, scope.used, used)
                return lr, used
        return self._stay(step, scope, f"the rate that {type(scope.rule).__name__} made of {seen}")

    def _tell_of_brake(self, seen: Observation, before: float, after: float) -> None:
        if self._ranks.is_first:
            _log.info(
                "HypergradientLR(%s): step %d: the gradient's norm leapt to %.3g, so the learning rate backs off from "
                "%.3g to %.3g",
                *(type(self.optimizer).__name__, self.step_count + 1, seen.grad_norm, before, after),
            )

    def _forget(self, scope: int, seen: Observation | None) -> None:
        """Drop a sum of directions that is not finite, and would never be again."""
        if self._rule.long_horizon and seen is not None and not math.isfinite(seen.direction_norm):
            for i in self._rates.members(scope):
                for p in self.optimizer.param_groups[i]["params"]:
                    self.optimizer.state.get(p, {}).pop(DISCOUNTED, None)

    def _stay(self, step: _Step, scope: Scope, what: str) -> tuple[float, float]:
        step.finite = False
        self._warn(
            "not finite",
            f"step {self.step_count + 1}: not a finite number in {what}; the learning rate stays at {scope.used:g}. "
            "Further such steps are counted in nonfinite_steps",
        )
        return scope.lr, scope.used

    def _set_out(self, step: _Step, index: int, moved: list[Tensor], lr: float, weight: float) -> None:
        """Give one group its rate, and keep what is needed to know its direction afterwards."""
        settings = self.optimizer.param_groups[index]
        scope = self._rates.scopes[self._rates.groups[index].scope]
        unknown = lr == 0 and isinstance(direction_of(self.optimizer, settings, lr), Measured)
        probed = weight != 0 and (unknown or (scope.rule.picks_start and not scope.started))
        lr = set_lr(settings, scope.trial_lr if probed else lr)
        direction = direction_of(self.optimizer, settings, lr)
        discount = (
            _returned(scope.rule.discount(self.step_count + 1), scope.rule, "discount")
            if self._rule.long_horizon
            else 0.0
        )
        step.groups.append(_GroupStep(lr, weight, direction, moved, probed, discount))
        self._last[index].moved = set()  # their directions are overwritten here, and known again once the step is done
        for p in moved:
            direction.correct(self.optimizer.state.get(p, {}), lr)
            if direction.copies:
                copy = self.optimizer.state.get(p, {}).get(DIRECTION)
                fits = copy is not None and (copy.shape, copy.dtype, copy.device) == (p.shape, p.dtype, p.device)
                step.kept[p] = copy if fits else torch.empty_like(p)
                direction.keep(step.kept[p], p, partial(self._gradient, settings, p))
            if probed:
                step.before[p] = p.clone(memory_format=torch.preserve_format)

    @torch.no_grad()
    def _finish(self) -> None:
        """The step is over."""
        if self._step is not None:
            self._take_over(self._step)
            self._step = None
        elif self._dry:
            self._make_room()

    def _take_over(self, step: _Step) -> None:
        """The parameters have moved: take over the rates and learn the directions."""
        for scope, (lr, used), seen in zip(self._rates.scopes, step.rates, step.observations, strict=True):
            scope.lr, scope.used, scope.last = lr, used, seen
        self._settle(step)
        if any(group.probed for group in step.groups):
            try:
                self._rescale(step)
            except BaseException:
                for p, before in step.before.items():
                    p.copy_(before)
                self._give_back_rates(step)
                raise
        for known, last, group in zip(self._rates.groups, self._last, step.groups, strict=True):
            known.lr = group.lr
            last.weight, last.direction, last.moved = group.weight, group.direction, set(group.moved)
            scope = self._rates.scopes[known.scope]
            moves = step.has_gradient[known.scope] and group.weight != 0
            scope.started |= moves and not (scope.rule.picks_start and group.probed)
        if self._rule.long_horizon:
            self._discount(step)
        if self._rates.under_schedule:
            self._give_back_rates(step)
        self.nonfinite_steps += not step.finite
        self.step_count += 1

    def _give_back_rates(self, step: _Step) -> None:
        """What the scheduler says; less by as much as the optimizer has lowered its rate during the step, if it has."""
        groups = self.optimizer.param_groups
        holding = [get_lr(settings) for settings in groups]  # first of all, for groups may share a tensor
        for settings, restore, group, held in zip(groups, step.restore, step.groups, holding, strict=True):
            lowered = held / group.lr if group.lr else 1.0
            set_lr(settings, restore * lowered if 0 <= lowered < 1 else restore)

    def _settle(self, step: _Step) -> None:
        """Put the copies that the directions need into the optimizer's state.

        But not where the optimizer, having a state for other parameters, has none for this one and did not move it: it
        will make one later, and may take anything that it finds there for its own.
        """
        state = self.optimizer.state
        late = any(isinstance(group.direction, Measured) for group in step.groups) and any(
            isinstance(own, dict) and own.keys() - {DIRECTION, DISCOUNTED} for own in state.values()
        )
        copied = [group for group in step.groups if group.direction.copies]
        for group in copied:
            for p in group.moved:
                group.direction.settle(step.kept[p], p, state.get(p, {}))
        without = [
            p
            for group in copied
            for p in group.moved
            if late and isinstance(group.direction, Measured) and not state.get(p, {}).keys() - {DIRECTION, DISCOUNTED}
        ]
        sharded = [p for p in without if isinstance(p, DTensor)]
        stood = {p for p in without if not isinstance(p, DTensor) and not step.kept[p].any()}
        if sharded:  # not all ranks may have seen them move
            moves = self._zeros(len(sharded))
            moves += moves.new_tensor([bool(local(step.kept[p]).any()) for p in sharded])
            stood |= {p for p, moved in zip(sharded, self._ranks.sum(moves).tolist(), strict=True) if not moved}
        for group in copied:
            group.moved = [p for p in group.moved if p not in stood]
            for p in group.moved:
                state[p][DIRECTION] = step.kept[p]

    def _rescale(self, step: _Step) -> None:
        """Replace steps at a rate for trial by steps at the rate that they should have had."""
        state = self.optimizer.state
        self._start(step)
        effective = self._rates.effective([scope.used for scope in self._rates.scopes])
        for group, settings, (lr, weight) in zip(step.groups, self.optimizer.param_groups, effective, strict=True):
            if not group.probed:
                continue
            group.lr, group.weight = set_lr(settings, lr), weight
            for p in group.moved:
                d = group.direction.read(p, state[p])
                group.direction.correct(state[p], group.lr)
                p.copy_(step.before[p])
                if group.lr:
                    as_real(p).copy_(widen(as_real(p)).sub(d, alpha=group.lr))
            if not isinstance(group.direction, Measured):  # that one was measured at the rate for trial
                group.direction = direction_of(self.optimizer, settings, group.lr)

    def _start(self, step: _Step) -> None:
        """Let rules that pick their first rate do so, or wait for another step."""
        waiting = [
            i
            for i, scope in enumerate(self._rates.scopes)
            if scope.rule.picks_start and not scope.started and step.has_gradient[i]
        ]
        if not waiting:
            return
        probed = [[step.groups[j] for j in self._rates.members(i) if step.groups[j].probed] for i in waiting]
        sums = self._ranks.sum(torch.stack([self._first_sums(step, groups) for groups in probed])).tolist()
        for i, groups, (d_squared, p_squared, nonzero) in zip(waiting, probed, sums, strict=True):
            scope = self._rates.scopes[i]
            if not math.isfinite(d_squared):
                self._stay(step, scope, "the first direction, so this step is not taken")
                scope.reduce_trial()
            if not math.isfinite(d_squared) or not nonzero:
                self._hold(step, groups)  # without a gradient, weight decay alone would give the scale
            elif d_squared:  # else there is no direction yet to take a first step in
                first = scope.rule.first_lr(math.sqrt(p_squared), math.sqrt(d_squared))
                lr = _returned(first, scope.rule, "first_lr")
                if not math.isfinite(lr):
                    raise ValueError(f"{type(scope.rule).__name__}.first_lr must return a finite number, got {lr}")
                scope.lr = lr = min(max(lr, -_LARGEST), _LARGEST)
                scope.lr = scope.used = self._rates.clamp(i, lr)
                scope.started = True

    def _first_sums(self, step: _Step, groups: list[_GroupStep]) -> Tensor:
        """This rank's part of ``‖d_1‖²``, ``‖θ_0‖²``, and whether any gradient is not zero, of shape (3,)."""
        sums = self._zeros(3)
        for group in groups:
            for p in group.moved:
                d = squared_norm(group.direction.read(p, self.optimizer.state[p]), sums.dtype) * group.weight**2
                theta = squared_norm(as_real(step.before[p]), sums.dtype)
                nonzero = d.new_tensor(0.0 if p.grad is None else bool(local(p.grad).any()))
                sums += torch.stack([d, theta, nonzero]).to(sums.device) / self._copies(p)
        return sums

    def _hold(self, step: _Step, groups: list[_GroupStep]) -> None:
        """Take back the steps of these groups."""
        for group in groups:
            for p in group.moved:
                p.copy_(step.before[p])
                self.optimizer.state[p].pop(DIRECTION, None)
            group.moved = []

    def _discount(self, step: _Step) -> None:
        """``D_t = μ_t D_{t-1} + d_t``, each direction weighted as its group's rate follows the scope's."""
        for group, settings in zip(step.groups, self.optimizer.param_groups, strict=True):
            for p in settings["params"]:
                state = self.optimizer.state.get(p, {})
                if DISCOUNTED in state:
                    state[DISCOUNTED] = widen(state[DISCOUNTED]).mul_(group.discount)
            for p in group.moved:
                state = self.optimizer.state[p]
                d = group.direction.read(p, state)
                if DISCOUNTED not in state or state[DISCOUNTED].shape != d.shape:
                    state[DISCOUNTED] = widen(torch.zeros_like(as_real(p)))
                state[DISCOUNTED].add_(d, alpha=group.weight)
                state.pop(DIRECTION, None)

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind of thing, on rank zero."""
        if kind not in self._warned and self._ranks.is_first:
            warnings.warn(f"HypergradientLR({type(self.optimizer).__name__}): {message}", RuntimeWarning, stacklevel=2)
        self._warned.add(kind)


def check_arguments(
    rule: Rule | str, hypergrad_lr: float | None, scope: str, min_lr: float | None, max_lr: float | None
) -> tuple[Rule, float, float]:
    """The rule and the two clamps that are asked for, once all arguments are found to be in order.

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
    return make_rule(rule, hypergrad_lr), low, high


def _returned(value: Any, rule: Rule, method: str) -> float:
    """What a rule's method returned, as a float."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(rule).__name__}.{method} must return a number, got {value!r}")
    return float(value)


def _plain(value: Any) -> Any:
    """What can be compared between processes: tensors by their numbers, functions by name, other objects by class."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if inspect.isfunction(value):
        return value.__qualname__
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__
