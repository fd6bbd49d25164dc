"""HypergradientLR, the public engine: it is attached to one torch optimizer and tunes its learning rate."""

from typing import Any, Literal, overload

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_hd.engine.arguments import check_arguments, check_shards, make_cooldown, warn_of_marks
from lightning_hd.engine.hooks import StepHooks, check_not_tuned
from lightning_hd.engine.looks import check_loss
from lightning_hd.engine.rates import Rates
from lightning_hd.engine.state import begin_from, load, save
from lightning_hd.engine.stats import Stats
from lightning_hd.engine.step import Tuning
from lightning_hd.engine.suggestion import suggestions
from lightning_hd.hypergradient import PROBE, Displacement, LastStep, View, following, leave_copies
from lightning_hd.optimizers import check_optimizer, get_lr, group_names, is_marked, parameters_of, unwrap
from lightning_hd.processes import Notices, Ranks
from lightning_hd.rules import Observation, Rule, RuleName, rule_name

_NONFINITE = 0.05
"""A GradScaler skips a few steps. If a larger part of them than this is not finite, the rates are not to be trusted."""


class HypergradientLR:
    r"""Tunes the learning rate of an optimizer by hypergradient descent, in any training loop.

    Build it, and leave the loop with ``loss.backward(); optimizer.step()`` as it is. In every step, between the
    backward pass and the update, the learning rate ``α`` follows the derivative of the loss with respect to it:

    ```math
    h_t = \frac{\partial f(\theta_{t-1})}{\partial \alpha} = -g_t \cdot d_{t-1}.
    ```

    ``g_t`` is the new gradient. ``d_{t-1}`` is the direction of the last update, ``θ_{t-1} = θ_{t-2} - α d_{t-1}``.
    Source: "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin et al., ICLR 2018, arXiv 1703.04782),
    Section 3.

    The default rule takes the derivative with respect to the logarithm of the rate that all remembered steps shared.
    It looks at a fixed sample of the coordinates, so its cost does not grow with the model, and at fewer steps later.
    It keeps 36 bytes for each coordinate, or 72 in float64. The paper's rules look at all coordinates in each step.
    They keep one copy of the parameters for SGD without momentum, Nesterov's, ASGD, and optimizers whose directions are
    measured, and nothing for the others.

    ``g_t`` is the gradient that the optimizer sees: after clipping and unscaling, with L2 (coupled) weight decay, and
    with its sign flipped under ``maximize=True``. Step hooks run in the order in which they are registered, so a hook
    that changes gradients must be registered before. Parameters without a gradient contribute nothing. A step without
    any gradient does not count. Nor does a step with rates and gradients of 0, before the first step or while the
    optimizer has no state: ``torch.distributed.checkpoint`` makes the state by such a step.

    With a scheduler, the effective rate is the scheduler's value times the learned scale. Between steps,
    ``param_groups[i]["lr"]`` holds the scheduler's own value. ``α`` is the scale times the highest rate that the
    schedule has reached (the configured one at least), so observations count for less where the schedule is low.
    A rule that picks its own first rate, as the default does, needs no warm-up. The configured rate does not count
    then, and ``α`` stays the same where a schedule rises to a new height. Without a scheduler,
    ``param_groups[i]["lr"]`` holds the effective rate. A value that is written there becomes the new ``α``.

    If a gradient, norm or dot product is not finite, the rate stays as it was, and the step is counted.

    Args:
        optimizer: Any ``torch.optim.Optimizer``. For the paper's rules, its step must be linear in its rate.
        rule: ``"auto"`` (``Auto``), ``"additive"`` or ``"multiplicative"`` (the paper's), or a ``Rule`` object, which
            is copied.
        hypergrad_lr: ``β`` of the paper's rules (for its unit see ``Additive``); ``None``: the rule's default.
        scope: ``"global"``: one ``α`` for all parameter groups, whose configured ratios stay as they are. ``α`` is the
            largest of their rates, and groups that are all configured at 0 count as equal. ``"group"``: an ``α`` each.
        min_lr: Lower clamp on the effective learning rate of every group; ``None``: unclamped, as in the paper, so
            that the additive rule may go below zero.
        max_lr: Upper clamp; ``None``: unclamped.
        probe: How many coordinates to look at. They are chosen once, by a fixed seed; ``None``: all. ``"default"``:
            2^16 at most with the default rule, all with the paper's.
        process_group: The processes that train this model together, each with a copy (DDP) or with shards (DTensor
            parameters, as of ``fully_shard`` and tensor parallelism). Hypergradients are summed over them by one
            ``all_reduce`` per look, and the rates are equal bit for bit. ``None``: the default group if
            ``torch.distributed`` is initialized. Give models that train apart a group each.
        total_steps: How many steps the training takes; ``None``: it is not known. The default rule takes it that a
            schedule which has begun to fall goes on falling until then.
        cooldown: The last part of these steps, from 0 to 1, over which the rates fall to 0; 0: none.
            ``"default"``: a fifth with the default rule, none with the paper's. There is none under a scheduler.
        stop_after: The number of steps after which tuning stops. The learned scale then stays as it is, and schedules
            and the cooldown go on. ``None``: never.
        scheduled: Whether ``param_groups[i]["lr"]`` belongs to a schedule between steps; ``None``: it is detected. All
            schedulers of ``torch.optim.lr_scheduler`` are noticed but ``ReduceLROnPlateau``. Pass ``True`` for that
            one, and where your own code writes a schedule.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or has no rate to tune (LBFGS, Rprop, SparseAdam), or another
            argument is of the wrong type. In the first step: a gradient is sparse, or the optimizer moves the
            parameters before it evaluates its closure (SAM).
        ValueError: An argument or a configured rate is out of range, or ``process_group`` lacks processes that hold
            shards of the parameters.
        RuntimeError: The optimizer has a ``HypergradientLR`` already. In the first step, on every process: the
            settings of the processes differ.

    Examples:
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

    _owner = "HypergradientLR"
    """The name that messages begin with."""

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule | RuleName = "auto",
        *,
        hypergrad_lr: float | None = None,
        scope: Literal["global", "group"] = "global",
        min_lr: float | None = 0.0,
        max_lr: float | None = None,
        probe: int | Literal["default"] | None = "default",
        process_group: ProcessGroup | None = None,
        total_steps: int | None = None,
        cooldown: float | Literal["default"] = "default",
        stop_after: int | None = None,
        scheduled: bool | None = None,
    ) -> None:
        checked, low, high = check_arguments(rule, hypergrad_lr, scope, min_lr, max_lr, probe, stop_after, scheduled)
        falling = make_cooldown(cooldown, total_steps, checked)
        if total_steps is None and not isinstance(cooldown, str) and cooldown:
            raise ValueError(f"cooldown={cooldown!r} has no effect without total_steps, the number of steps")
        check_optimizer(optimizer)
        ranks = Ranks(process_group)
        ranks.check_meshes(parameters_of(optimizer))
        self._optimizer = unwrap(optimizer)
        check_not_tuned(self._optimizer)
        check_shards(self._optimizer, checked)
        self._name = type(self._optimizer).__name__
        notices = Notices(self._owner, self._name, ranks)
        self._loads = 0  # how often the optimizer had loaded a state when this loaded its own
        with following(self._optimizer) as self._copies:
            rates = Rates(optimizer, checked, scope, (low, high), scheduled, notices)
            view: View
            if checked.long_horizon:
                self._copies.tensors.clear()  # they belong to a rule that this training had before
                view = Displacement(self._optimizer, PROBE if probe == "default" else probe, ranks, notices)
            else:
                view = LastStep(self._optimizer, None if probe == "default" else probe, ranks, notices)
            self._tuning = Tuning(self._optimizer, checked, rates, view, ranks, notices, falling, stop_after)
            if scheduled is None:
                warn_of_marks(optimizer, total_steps, notices)
            self._hooks: StepHooks | None = StepHooks(self._optimizer, self._tuning, notices)

    def __repr__(self) -> str:
        return f"{self._owner}({self._name}, rule={rule_name(type(self._tuning.rule).__name__)!r}, lrs={self.lrs})"

    # ------------------------------------------------------------------ what others read

    @property
    def lrs(self) -> list[float]:
        """The effective learning rate of each parameter group, which the last step used."""
        known = [group.lr for group in self._tuning.rates.groups]
        return known + [get_lr(group) for group in self._optimizer.param_groups[len(known) :]]

    @property
    def scales(self) -> list[float]:
        """The learned scale of each scope: the effective rate over the configured or, with a scheduler, scheduled one.

        Where the rate is configured at 0, it is the effective rate itself.
        """
        return [scope.used / scope.reference for scope in self._tuning.rates.scopes]

    @property
    def last(self) -> list[Observation | None]:
        """What the last look has shown of each scope; ``None`` if there was no update before it to judge.

        Numbers that are not finite are here, too. The rate stayed as it was because of them.
        """
        return [scope.last for scope in self._tuning.rates.scopes]

    @property
    def step_count(self) -> int:
        """The number of optimizer steps since the run began. A run whose state was loaded goes on counting."""
        return self._tuning.step_count

    @property
    def stats(self) -> Stats:
        """Figures of the steps so far: back-offs, time, clamps, loss and others."""
        tuning = self._tuning
        return Stats(
            backoffs=tuple(scope.rule.backoffs for scope in tuning.rates.scopes),
            nonfinite_steps=tuning.nonfinite_steps,
            seconds=tuning.seconds,
            coordinates=tuning.view.share,
            limits=tuning.rates.limits,
            loss=tuning.loss,
            writes=tuning.writes.count,
        )

    @overload
    def suggestion(self) -> float: ...

    @overload
    def suggestion(self, *, by_group: Literal[True]) -> dict[str, float]: ...

    def suggestion(self, *, by_group: bool = False) -> float | dict[str, float]:
        """The constant rate that the steps so far suggest for a training like this one without tuning.

        It is 0.6 times the 0.8-quantile of the rates in the first half of the steps so far, without the cooldown at the
        end, but not below the lowest of them. Source: this project.

        Args:
            by_group: Whether to return the rate of each parameter group by its name: ``"Adam/pg1"``, or ``"Adam/"`` and
                the group's ``name``. A single group without a name has the name of its optimizer.

        Raises:
            RuntimeError: No step was tuned yet.
            ValueError: The groups have different rates, and ``by_group`` is not ``True``.

        Warns:
            RuntimeWarning: Many steps were not finite.
        """
        lrs = suggestions(self._tuning.rates)
        if lrs is None:
            raise RuntimeError(f"{self._owner}({self._name}): no suggestion before a step has moved the parameters")
        self._warn_of_nonfinite_steps()
        named = dict(zip(group_names(self._name, self._optimizer), lrs, strict=False))
        return named if by_group else common_rate(named)

    def _warn_of_nonfinite_steps(self) -> None:
        """Warn if so many steps were not finite that the suggested rate says little."""
        wrong, steps = self._tuning.nonfinite_steps, self.step_count
        if wrong > _NONFINITE * steps:
            self._tuning.notices.warn(
                "suggestion", f"the suggested rate says little, because {wrong} of {steps} steps were not finite"
            )

    @property
    def paused(self) -> bool:
        """While it is ``True``, steps are neither tuned nor counted. The learned scale stays. Settable."""
        return self._tuning.paused or self._tuning.aside

    @paused.setter
    def paused(self, value: bool) -> None:
        self._tuning.paused = bool(value)

    @property
    def scheduled(self) -> bool:
        """Whether ``param_groups[i]["lr"]`` belongs to a schedule between steps: what was passed, or is detected."""
        return self._tuning.rates.is_scheduled()

    def observe(self, loss: Tensor | float) -> None:
        """Report the loss of the next step, or of the last one. The default rule backs off where the loss rises.

        It need not be called if ``optimizer.step`` gets a closure, which returns the loss. Several losses before a step
        are averaged, over the processes as well. A loss that is not finite counts as unknown. The call does not wait
        for a device.

        Args:
            loss: The loss: a number, or a tensor of one element.

        Raises:
            TypeError: ``loss`` is neither.
        """
        counts = self._hooks is not None and not self.paused
        known = check_loss(loss)
        if counts:
            self._tuning.looks.losses.reported.append(known)

    def detach(self, *, keep_state: bool = False) -> None:
        """Remove every hook and buffer from the optimizer.

        ``param_groups[i]["lr"]`` stays as it is between steps. It is the rate that was reached or, with a scheduler,
        the scheduler's own value without the learned scale.

        Args:
            keep_state: Whether to leave the ``hd_*`` tensors in ``optimizer.state``, for a later checkpoint.
        """
        self._tuning.abandon()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            leave_copies(self._optimizer, keep_state)

    def state_dict(self) -> dict[str, Any]:
        """What was learned: plain numbers and, with the default rule, four numbers for each coordinate of the probe.

        Tensors of the parameters' size are in ``optimizer.state_dict()``, under keys ``hd_*``. The state is the same on
        any number of processes. If parameters are sharded, call this on all processes.
        """
        return save(self._tuning)

    def load_state_dict(self, state_dict: dict[str, Any], *, warm_start: bool = False) -> None:
        """Load what ``state_dict`` returned. Load the optimizer's own state dict as well, before or after.

        A rate that was written into ``param_groups[i]["lr"]`` before the states were saved, or before this is called,
        becomes the new ``α`` in the next step.

        Args:
            state_dict: The state.
            warm_start: Whether a new training begins, with a new optimizer, where the other has ended. It takes over
                ``α``, what the rule remembers and the number of steps, and ``total_steps`` counts from here on. The
                groups keep the rates that they are configured with. Without a scheduler these only set the ratios.

        Raises:
            ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, of a former
                version, or damaged.
        """
        loaded, self._loads = self._copies.loads > self._loads, self._copies.loads
        self._copies.stale |= not self._loads and is_marked(self._optimizer.param_groups)  # it may have come before
        if warm_start:
            begin_from(self._tuning, state_dict)
        else:
            load(self._tuning, state_dict, loaded)
        if self._hooks is not None and self.step_count:
            self._hooks.proven = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": self._hooks is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_hooks")
        vars(self).update(state, _hooks=None)
        if attached:  # torch does not copy the hooks of an optimizer
            check_not_tuned(self._optimizer)
            self._copies.follow(self._optimizer)
            self._hooks = StepHooks(self._optimizer, self._tuning, notices=None)


def common_rate(suggested: dict[str, float]) -> float:
    """The one suggested rate of all parameter groups.

    Raises:
        ValueError: They have different rates.
    """
    first, *others = suggested.values()
    if any(lr != first for lr in others):
        raise ValueError(f"suggestion() is one rate, but there are {suggested}: call suggestion(by_group=True)")
    return first
