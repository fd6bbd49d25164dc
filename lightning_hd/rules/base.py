"""What a rule is: how a learning rate follows its hypergradient. Scalars in, scalars out."""

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor


class Observation(NamedTuple):
    """What one step shows of the learning rate of one scope.

    Attributes:
        hypergradient: ``h_t = -g_t · d_{t-1}``, the derivative of the loss with respect to the last learning rate. For
            a rule with a long horizon ``h_t = g_t · E_t``, the derivative with respect to the logarithm of the rate
            that all remembered steps shared.
        grad_norm: ``‖g_t‖``, the Euclidean norm of the new gradient.
        direction_norm: ``‖d_{t-1}‖ = ‖∂u_{t-1}/∂α‖``, the Euclidean norm of the last update direction. For a rule with
            a long horizon ``‖E_t‖``, that of the sum of the remembered moves. 0 where the last step vanished in the
            rounding of the parameters.
    """

    hypergradient: float
    grad_norm: float
    direction_norm: float

    @property
    def cosine(self) -> float:
        """Cosine of ``g_t`` and ``d_{t-1}`` (or ``-E_t``): positive where steps should have been longer, or 0."""
        norms = self.grad_norm * self.direction_norm
        return -self.hypergradient / (norms + (norms == 0))  # the comparison keeps 0/0 out, for tensors as well


class Rule(ABC):
    """How a learning rate follows its hypergradient. Subclass it to try a rule of your own.

    A copy of the rule object serves each scope: each optimizer, or each parameter group with ``scope="group"``. It may
    hold numbers of its own, which checkpoints carry along. Clamps are applied to what it returns. Written with
    arithmetic alone, without branches, a rule works for 0-dim tensors as well as for floats.

    Attributes:
        long_horizon: ``True``: the derivative is taken with respect to the logarithm of the rate that all remembered
            steps shared: ``E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1})`` is the sum of the moves (see ``discount``). It
            needs nothing of the optimizer, and looks at a sample of the coordinates. ``False``, the default: with
            respect to the last rate, from the direction of the last step.
        picks_start: ``True``: the first learning rate comes from ``first_lr``, and the configured one sets the
            ratios between groups only. Default: ``False``.
        brakes: How often the rule has backed off from an overshoot; whoever calls ``update`` reports each rise.
        rounding: The relative rounding of gradients, set by the engine: that of float32, or of float64.
        nonlinear: Set to ``True`` where the optimizer's step is found not to be linear in its rate, so that a change of
            the rate moves what former steps have done.

    Examples:
        >>> from lightning_hd import Rule
        >>> class Sign(Rule):
        ...     def update(self, lr, seen, step):
        ...         return lr * (1.01 if seen.cosine > 0 else 0.99)
    """

    long_horizon = False
    picks_start = False
    brakes = 0
    nonlinear = False
    rounding = 2.0**-23

    @abstractmethod
    def update(self, lr: float, seen: Observation, step: int) -> float:
        """The next learning rate ``α_t``.

        Args:
            lr: The learning rate ``α_{t-1}``.
            seen: What this step's gradient tells about it.
            step: ``t``, counted from 1; the first step that has an observation is the second.
        """

    def watch(self, lr: float, loss: float, step: int) -> float:
        """``α_t``, once the loss is known as well; it is called after ``update`` where there is one.

        Args:
            lr: What ``update`` returned.
            loss: The loss of the step, averaged over the processes: a finite number.
            step: ``t``.
        """
        return lr

    def used(self, lr: float, step: int) -> float:
        """The rate that step ``t`` is taken with, where it is not ``α_t`` itself."""
        return lr

    def discount(self, lr: float, step: int) -> float:
        """``φ_t``, the part of ``E`` that is left where the next move comes in, for a rule with ``long_horizon``.

        Args:
            lr: ``γ_t``: ``α_t``, times what the decline at the end makes of it.
            step: ``t``; it is called once for each.
        """
        raise NotImplementedError(f"{type(self).__name__} has a long horizon and must say how it discounts")

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        """The first rate ``α_1`` from ``‖θ_0‖`` and ``‖d_1‖``, for a rule with ``picks_start``."""
        raise NotImplementedError(f"{type(self).__name__} picks its first rate and must say which")

    def check_start(self, lr: float) -> None:  # noqa: B027
        """Raise ``ValueError`` where the rule cannot work from the configured rate ``lr``."""

    def bind(self, normalized: bool) -> "Rule":
        """A copy of the rule for one scope.

        Args:
            normalized: Whether the optimizer divides the gradient by its scale (Adam and its like), rather than taking
                steps proportional to it (SGD).
        """
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """The numbers and tensors that the rule object holds, by attribute name; override it for anything else."""
        held: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                held[name] = value.detach().clone()
            elif isinstance(value, (int, float)):
                # numpy's numbers are such as well, but torch does not load them with weights_only=True
                held[name] = value.item() if hasattr(value, "item") else value
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        vars(self).update(copy.deepcopy(state_dict))


def returned(value: Any, rule: Rule, method: str) -> float:
    """What a rule's method returned, as a float.

    Raises:
        TypeError: It is no number.
    """
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(rule).__name__}.{method} must return a number, got {value!r}")
    return float(value)
