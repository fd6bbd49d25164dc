"""Rule: how a learning rate follows its hypergradient. It takes the current rate and returns the next."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor


class Observation(NamedTuple):
    """What one step shows of the learning rate of one scope.

    Attributes:
        hypergradient: ``h_t = -g_t · d_{t-1}``, the derivative of the loss with respect to the last learning rate
            (Section 3 of the paper). Its unit is that of the loss over that of the rate. For a rule with a long
            horizon it is ``h_t = g_t · E_t``, the derivative with respect to the logarithm of the rate that all
            remembered steps shared (this project). Its unit is that of the loss.
        grad_norm: ``‖g_t‖``, the Euclidean norm of the new gradient.
        direction_norm: ``‖d_{t-1}‖ = ‖∂u_{t-1}/∂α‖``, the Euclidean norm of the last update direction. For a rule with
            a long horizon it is ``‖E_t‖``, the norm of the sum of the remembered moves. It is 0 if the last step
            vanished in the rounding of the parameters.
        late: ``g_t · Ē_{t-1}``, with the running mean ``Ē`` of ``E`` (see ``Rule.smoothing``). Like the next ones, it
            is 0 for a rule without a long horizon.
        turn: The cosine of ``g_t`` and ``g_{t-1}``: near -1 if gradients turn round, near 1 if they do not turn.
        slope: ``g_t · (θ_t - θ_{t-1})``, the derivative of the loss along the last move, at its end.
        move_norm: ``‖θ_t - θ_{t-1}‖``.
        param_norm: ``‖θ_t‖``.
    """

    hypergradient: float
    grad_norm: float
    direction_norm: float
    late: float = 0.0
    turn: float = 0.0
    slope: float = 0.0
    move_norm: float = 0.0
    param_norm: float = 0.0

    @property
    def cosine(self) -> float:
        """The cosine of ``g_t`` and ``d_{t-1}`` (or ``-E_t``): positive if steps were too short, 0 if a norm is 0."""
        norms = self.grad_norm * self.direction_norm
        return -self.hypergradient / (norms + (norms == 0))  # the comparison keeps 0/0 out, for tensors as well


class Context(NamedTuple):
    """What a rule is told of the run, beside what the step shows.

    Attributes:
        step: ``t``, the number of the step, counted from 1. It starts anew where the rate starts anew.
        cooldown: The length of the cooldown at the end that is still to come, in steps; 0 if there is none. Under a
            schedule that has begun to fall, it is all of the steps that are still to come, if their number is known.
        rounding: The relative rounding of gradients, in float32 or in float64.
        nonlinear: Whether the optimizer's step is found not to be linear in its rate. A change of the rate then also
            changes what former steps have done.
        stride: For how many steps the observation stands: the number of steps since the one before.
        length: The number of steps after which the rates are to have fallen, by the cooldown or a schedule, counted as
            ``step`` is. It is infinite if that is not known, or they do not fall.
    """

    step: int
    cooldown: float = 0.0
    rounding: float = 2.0**-23
    nonlinear: bool = False
    stride: int = 1
    length: float = math.inf


Event: TypeAlias = Literal["fit", "rewritten", "replaced"]
"""What makes a rule begin with a new model or new data."""


class Rule(ABC):
    """How a learning rate follows its hypergradient. Subclass it to try a rule of your own.

    A copy of the rule object serves each scope: each optimizer, or each parameter group with ``scope="group"``. It may
    hold numbers of its own, which go into checkpoints. The rates that it returns are clamped. A rule that is written
    with arithmetic alone, without branches, works for 0-dim tensors as well as for floats.

    Attributes:
        long_horizon: Which derivative the rule gets. ``False``, the default: with respect to the last rate, from the
            direction of the last step. ``True``: with respect to the logarithm of the rate that all remembered steps
            shared, from the sum of the moves ``E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1})`` (see ``discount``). Here
            ``θ_t`` are the parameters before step ``t``. This works with any optimizer, and looks at a sample of the
            coordinates.
        picks_start: Whether the first learning rate comes from ``first_lr``. The configured rate then only sets the
            ratios between groups. Default: ``False``.
        backoffs: How often the rule has backed off from an overshoot. The engine reports each increase.

    Examples:
        >>> from lightning_hd import Rule
        >>> class Sign(Rule):
        ...     def update(self, lr, seen, context):
        ...         return lr * (1.01 if seen.cosine > 0 else 0.99)
    """

    long_horizon = False
    picks_start = False
    backoffs = 0

    @abstractmethod
    def update(self, lr: float, seen: Observation, context: Context) -> float:
        """The next learning rate ``α_t``.

        Args:
            lr: The learning rate ``α_{t-1}``.
            seen: The observation of this step. The first step with an observation is the second.
            context: What is known of the run.
        """

    def watch(self, lr: float, loss: float, context: Context) -> float:
        """``α_t`` if the loss of the step is known. It is called after ``update``.

        Args:
            lr: The rate from ``update``.
            loss: The loss of the step, averaged over the processes. It is a finite number.
            context: What is known of the run.
        """
        return lr

    def stride(self, step: int, calm: int) -> int:
        """How many steps the next look may be after the last one: 1, to look at each step, or more.

        Args:
            step: ``t``, the number of the step, counted from 1.
            calm: How many steps there were since a number was not finite, a rate was written, or groups changed.
        """
        return 1

    def used(self, lr: float, context: Context) -> float:
        """``γ_t``, the rate of step ``t``, if that is not ``α_t`` itself. Between two looks it stays as it is."""
        return lr

    def discount(self, lr: float, context: Context) -> float:
        """``φ_t``, the part of ``E`` that is left when the next move is added, for a rule with ``long_horizon``.

        Args:
            lr: ``α_t`` times the factor of the cooldown at the end.
            context: What is known of the run. It is called once for each step that is looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} has a long horizon, so it must implement discount()")

    def smoothing(self, context: Context) -> float:
        """``w_t``, the weight of ``E_t`` in its running mean ``Ē_t = (1 - w_t) Ē_{t-1} + w_t E_t``."""
        return 1.0

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        """The first rate ``α_1``, for a rule with ``picks_start``.

        Args:
            param_norm: ``‖θ_1‖``, the norm of the parameters before the first step.
            direction_norm: ``‖d_1‖``, the norm of the first direction.
        """
        raise NotImplementedError(f"{type(self).__name__} picks its first rate, so it must implement first_lr()")

    def check_start(self, lr: float) -> None:  # noqa: B027
        """Raise ``ValueError`` if the rule cannot work from the configured rate ``lr``."""

    def bind(self, normalized: bool) -> "Rule":
        """A copy of the rule for one scope.

        Args:
            normalized: Whether the optimizer divides the gradient by its scale (as Adam does). Otherwise its steps are
                proportional to the gradient (as those of SGD are).
        """
        return copy.deepcopy(self)

    def begin(self, event: Event) -> None:  # noqa: B027
        """Forget what does not hold for a new model or new data. All else that was learned stays.

        Args:
            event: What has happened. ``"fit"``: a warm start, so another fit begins. ``"rewritten"``: others have
                rewritten parameters, and do so once in a while only. ``"replaced"``: all parameters are other ones, so
                the moves are forgotten as well.
        """

    def state_dict(self) -> dict[str, Any]:
        """The numbers and tensors that the rule object holds, by attribute name. Override it for anything else."""
        held: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                held[name] = value.detach().clone()
            elif isinstance(value, (int, float)):
                # numpy's numbers may be floats, but torch does not load them with weights_only=True
                held[name] = value.item() if hasattr(value, "item") else value
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        vars(self).update(copy.deepcopy(state_dict))
