"""HypergradientLR: attached to one torch optimizer, it tunes the rate of its steps; what the public reads and saves."""

from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_hd.arguments import check_arguments, check_flat_shards, make_decline
from lightning_hd.checkpoints import copies_of, drop_copies, keep_copies
from lightning_hd.checks import check_count
from lightning_hd.hooks import StepHooks
from lightning_hd.laststep import LastStep
from lightning_hd.lr import get_lr
from lightning_hd.moves import Moves
from lightning_hd.notices import Notices
from lightning_hd.optimizers import check_optimizer, unwrap
from lightning_hd.probe import PROBE
from lightning_hd.rates import Rates
from lightning_hd.reduction import Ranks
from lightning_hd.rules import Observation, Rule
from lightning_hd.saved import load, save
from lightning_hd.step import Tuning
from lightning_hd.tensorboard import group_names


class HypergradientLR:
    r"""Tunes the learning rate of an optimizer by hypergradient descent, in any training loop.

    After it is built, ``loss.backward(); optimizer.step()`` needs no other change. Around every step, between the
    backward pass and the update, the learning rate ``α`` follows the derivative of the loss with respect to it,

    ```math
    h_t = \frac{\partial f(\theta_{t-1})}{\partial \alpha} = -g_t \cdot d_{t-1},
    ```

    ``g_t`` being the new gradient and ``d_{t-1}`` the direction of the last update, ``θ_{t-1} = θ_{t-2} - α d_{t-1}``.
    Source: "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin et al., ICLR 2018, arXiv 1703.04782),
    Section 3.

    The default rule takes the derivative with respect to the logarithm of the rate that all remembered steps shared,
    at a fixed sample of the coordinates, so that its cost does not grow with the model. It keeps 8 bytes for each of
    them. The paper's rules look at all coordinates. They keep one copy of the parameters for SGD without momentum,
    Nesterov's, ASGD, and optimizers whose directions are measured, and nothing for the others.

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
        optimizer: Any ``torch.optim.Optimizer``; for the paper's rules one whose step is linear in its rate.
        rule: ``"auto"`` (``Auto``), ``"additive"`` or ``"multiplicative"`` (the paper's), or a ``Rule`` object, which
            is copied.
        hypergrad_lr: ``β`` of the paper's rules; ``None``: the rule's default.
        scope: ``"global"``: one ``α`` for all parameter groups, whose configured ratios stay as they are (``α`` is the
            largest of their rates; groups all configured at 0 count as equal). ``"group"``: an ``α`` for each.
        min_lr: Lower clamp on the effective learning rate of every group; ``None``: unclamped, as in the paper, and
            the additive rule may go below zero.
        max_lr: Upper clamp; ``None``: unclamped.
        probe: How many coordinates to look at, chosen once by a fixed seed; ``None``: all. ``"default"``: 2^18 with the
            default rule, all with the paper's. In a smaller model it is all of them anyway.
        process_group: The processes that train this model together, each with a copy (DDP) or with shards (DTensor
            parameters, as of ``fully_shard`` and tensor parallelism): hypergradients are summed over them, in one
            ``all_reduce`` per step, and the rates are equal bit for bit. ``None``: the default group, where
            ``torch.distributed`` is initialized; for models that train apart, give each a group of its own.
        total_steps: How many steps the training takes; ``None``: it is not known.
        decline: Over which last part of them the rates fall to 0, linearly; 0: none. ``"default"``: a fifth with the
            default rule, none with the paper's. Under a scheduler they do not.
        stop_after: After how many steps tuning stops: the learned scale stays as it is, and schedules and the decline
            go on. ``None``: never.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or has no rate to tune (LBFGS, Rprop, SparseAdam), or another
            argument is of the wrong type. In the first step: a gradient is sparse, or the optimizer moves the
            parameters before it evaluates its closure (SAM).
        ValueError: An argument or a configured rate is out of range, or ``process_group`` lacks processes that hold
            shards of the parameters.
        RuntimeError: The optimizer has a ``HypergradientLR`` already. In the first step: the processes do not
            tune the same (on every one of them).

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
    """Whom messages are from."""

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule | str = "auto",
        hypergrad_lr: float | None = None,
        scope: Literal["global", "group"] = "global",
        min_lr: float | None = 0.0,
        max_lr: float | None = None,
        probe: int | Literal["default"] | None = "default",
        process_group: ProcessGroup | None = None,
        total_steps: int | None = None,
        decline: float | Literal["default"] = "default",
        stop_after: int | None = None,
    ) -> None:
        self._rule, low, high = check_arguments(rule, hypergrad_lr, scope, min_lr, max_lr, probe, stop_after)
        falling = make_decline(decline, total_steps, self._rule)
        if total_steps is None and not isinstance(decline, str) and decline:
            raise ValueError(f"decline={decline!r} has no effect without total_steps, the number of steps")
        check_optimizer(optimizer)
        ranks = Ranks(process_group)
        ranks.check_meshes(p for settings in optimizer.param_groups for p in settings["params"])
        self.optimizer = unwrap(optimizer)
        self.scope = scope
        check_flat_shards(self.optimizer, self._rule)
        rates = Rates(self.optimizer, self._rule, scope, low, high)
        self._name = type(self.optimizer).__name__
        notices = Notices(f"{self._owner}({self._name})", ranks)
        budget = (PROBE if self._rule.long_horizon else None) if probe == "default" else probe
        self._copies = copies_of(self.optimizer)
        self._loads = 0  # how many of the optimizer's loaded states are taken account of
        view: Moves | LastStep
        if self._rule.long_horizon:
            self._copies.tensors.clear()  # of a rule that this training has had before
            view = Moves(self.optimizer, budget, ranks, notices)
        else:
            view = LastStep(self.optimizer, budget, ranks, notices, self._copies)
        self._tuning = Tuning(self.optimizer, self._rule, rates, view, ranks, notices, falling, stop_after)
        self._hooks: StepHooks | None = None
        self._seconds = 0.0  # of hooks that were removed
        self._attach()

    # ------------------------------------------------------------------ what others read

    @property
    def lrs(self) -> list[float]:
        """The effective learning rate of each parameter group: the one that the last step used."""
        known = [group.lr for group in self._tuning.rates.groups]
        return known + [get_lr(settings) for settings in self.optimizer.param_groups[len(known) :]]

    @property
    def scales(self) -> list[float]:
        """The learned scale of each scope: the effective rate over the configured or, with a scheduler, scheduled one.

        It is over 1 where that is configured at 0.
        """
        return [scope.scale for scope in self._tuning.rates.scopes]

    @property
    def brakes(self) -> list[int]:
        """How often the rule of each scope has backed off from an overshoot.

        Each time is reported to the logger ``lightning_hd.hypergradient``, at the level INFO.
        """
        return [scope.rule.brakes for scope in self._tuning.rates.scopes]

    @property
    def last(self) -> list[Observation | None]:
        """What the last step showed, for each scope; ``None`` where there was no update before it to judge.

        Its numbers are not finite where the rate stayed as it was for that reason.
        """
        return [scope.last for scope in self._tuning.rates.scopes]

    @property
    def step_count(self) -> int:
        """Number of optimizer steps since it was built, or since the run whose state was loaded began."""
        return self._tuning.step_count

    @property
    def nonfinite_steps(self) -> int:
        """Number of steps that left the rate as it was because a number was not finite."""
        return self._tuning.nonfinite_steps

    @property
    def loss(self) -> float | None:
        """The loss of the last step, averaged over the processes; ``None``: it is not known."""
        return self._tuning.loss

    def suggestion(self) -> float | dict[str, float]:
        """The constant rate that the steps so far recommend for such a training without tuning.

        It is 0.6 times the 0.8-quantile of the rates in the first half of the steps so far, without the decline at the
        end. The source is this project.

        Returns:
            The rate; with several parameter groups one for each, by its name: ``"Adam/pg1"``, or ``"Adam/"`` and the
            group's ``name``.

        Raises:
            RuntimeError: No step was tuned yet.
        """
        lrs = self._tuning.rates.suggestions()
        if lrs is None:
            raise RuntimeError(f"{self._owner}({self._name}): there is no suggestion before a step was tuned")
        return dict(zip(group_names(self._name, self.optimizer), lrs, strict=False)) if len(lrs) > 1 else lrs[0]

    @property
    def seconds(self) -> float:
        """How long tuning has taken on this process, in seconds."""
        return self._seconds + (self._hooks.seconds if self._hooks is not None else 0.0)

    @property
    def limits(self) -> tuple[float, float]:
        """The clamps, infinite where there is none."""
        return self._tuning.rates.limits

    @property
    def paused(self) -> bool:
        """While ``True``, steps are left alone: neither tuned nor counted. Settable."""
        return self._tuning.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self._tuning.paused = bool(value)

    @property
    def scheduled(self) -> bool | None:
        """Whether ``param_groups[i]["lr"]`` belongs to a scheduler between steps; ``None``: found out. Settable.

        It is found out from the groups' ``initial_lr``, which all schedulers of ``torch.optim.lr_scheduler`` but
        ``ReduceLROnPlateau`` set: set it to ``True`` for that one.
        """
        return self._tuning.rates.scheduled

    @scheduled.setter
    def scheduled(self, value: bool | None) -> None:
        self._tuning.rates.scheduled = None if value is None else bool(value)

    @property
    def under_schedule(self) -> bool:
        """Whether a scheduler owns the rates, as said by ``scheduled`` or found out."""
        return self._tuning.rates.is_scheduled()

    @property
    def total_steps(self) -> int | None:
        """How many steps the training takes, those of this engine; ``None``: it is not known. Settable."""
        return self._tuning.decline.total

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        self._tuning.decline.total = None if value is None else check_count("total_steps", value)

    @property
    def probe(self) -> tuple[int, int]:
        """How many coordinates were looked at in the last step, and how many there are."""
        return self._tuning.view.share

    def observe(self, loss: Tensor | float) -> None:
        """Report the loss of the step that comes, or of the last one; the default rule backs off where it rises.

        A closure that is given to ``optimizer.step`` reports what it returns, and needs no call. What is reported
        before a step is averaged, over the processes too. A loss that is not finite counts as unknown. Nothing waits
        for a tensor on a device.

        Args:
            loss: The loss: a number, or a tensor of one.

        Raises:
            TypeError: It is neither.
        """
        self._tuning.losses.report(loss, keep=self.attached and not self.paused)

    @property
    def attached(self) -> bool:
        """Whether the optimizer is being tuned: from the beginning until ``detach``."""
        return self._hooks is not None

    def detach(self, *, keep_state: bool = False) -> None:
        """Remove every hook and buffer, and leave the optimizer as any other.

        ``param_groups[i]["lr"]`` stays as it is between steps: the rate that was reached or, with a scheduler, the
        scheduler's own value, without the learned scale.

        Args:
            keep_state: Leave the ``hd_*`` tensors in ``optimizer.state``, for a checkpoint that is written later.
        """
        self._tuning.abandon()
        if self._hooks is not None:
            self._seconds = self.seconds
            self._hooks.remove()
            self._hooks = None
        self._tuning.watch.end()
        drop_copies(self.optimizer, self._copies, keep_state)

    def state_dict(self) -> dict[str, Any]:
        """What was learned: plain numbers, and a vector of the coordinates that are looked at.

        Tensors of the parameters' size are in ``optimizer.state_dict()``, under keys ``hd_*``. It is the same on any
        number of processes. Where parameters are sharded, call it on all of them.
        """
        return save(self._tuning)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned; load the optimizer's own state dict as well, before or after.

        A rate that was written into ``param_groups[i]["lr"]`` before either of them was saved, or before this is
        called, becomes the new one in the next step, as ever.

        Raises:
            ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, of a former
                version, or damaged.
        """
        loaded, self._loads = self._copies.loads > self._loads, self._copies.loads
        load(self._tuning, state_dict, loaded)
        if self._hooks is not None and self.step_count:
            self._hooks.proven = True

    def check_agreement(self) -> None:
        """Compare the learning rates of all processes of the group; to be called on each of them.

        Raises:
            RuntimeError: They are not equal bit for bit: on every process.
        """
        self._tuning.ranks.check_agreement(f"{self._owner}({self._name})", self.step_count, self.lrs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_hooks")
        vars(self).update(state, _hooks=None)
        if attached:  # torch leaves the hooks behind when it copies an optimizer
            keep_copies(self.optimizer, self._copies)
            self._attach()

    def _attach(self) -> None:
        tuning = self._tuning
        self._hooks = StepHooks(
            self.optimizer, tuning.begin, tuning.prepare, tuning.losses.hear, tuning.pass_by, tuning.finish
        )
