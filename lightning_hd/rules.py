"""Rules: how the learning rate follows the hypergradient. Scalars in, scalars out.

The source of the rules is Section 3 of "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin, Cornish,
Martínez Rubio, Schmidt, Wood; ICLR 2018; arXiv 1703.04782), called "the paper" below.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


class Observation(NamedTuple):
    """What one step tells about the learning rate of one scope.

    Args:
        hypergradient: ``h_t = -g_t · d_{t-1}``, the derivative of the loss with respect to the last learning rate.
        grad_norm: ``‖g_t‖``, the Euclidean norm of the new gradient.
        direction_norm: ``‖d_{t-1}‖ = ‖∂u_{t-1}/∂α‖``, the Euclidean norm of the last update direction.
    """

    hypergradient: float
    grad_norm: float
    direction_norm: float

    @property
    def cosine(self) -> float:
        """Cosine of ``g_t`` and ``d_{t-1}``: positive where the last step should have been longer; 0 for zero norms."""
        norms = self.grad_norm * self.direction_norm
        return -self.hypergradient / (norms + (norms == 0))  # the comparison keeps 0/0 out, for tensors as well


def inverse_square(step: int) -> float:
    """``δ(t) = 1/t²``, the weight that the paper proposes for its transition to a fixed rate (Section 5)."""
    return step**-2


class Rule(ABC):
    """How a learning rate follows its hypergradient. Subclass it to try a rule of your own.

    A copy of the rule object serves each scope: each optimizer, or each parameter group with ``scope="group"``. It may
    hold numbers of its own, which checkpoints carry along. Clamps are applied to what it returns. Written with
    arithmetic alone, without branches, a rule works for 0-dim tensors as well as for floats.

    Attributes:
        long_horizon: Class attribute. ``True``: the hypergradient is taken with respect to the discounted sum of
            directions ``D_t = μ_t D_{t-1} + d_t`` (see :meth:`discount`), for which one parameter-sized buffer is kept,
            instead of the last direction alone. Default: ``False``.
        picks_start: Class attribute. ``True``: the first learning rate comes from :meth:`start`, and the configured one
            sets the ratios between groups only. Default: ``False``.

    Example::

        >>> from lightning_hd import Rule
        >>> class Sign(Rule):
        ...     def update(self, lr, seen, step):
        ...         return lr * (1.01 if seen.cosine > 0 else 0.99)
    """

    long_horizon: ClassVar[bool] = False
    picks_start: ClassVar[bool] = False

    @abstractmethod
    def update(self, lr: float, seen: Observation, step: int) -> float:
        """The next learning rate ``α_t``.

        Args:
            lr: The learning rate ``α_{t-1}``.
            seen: What this step's gradient tells about it.
            step: ``t``, counted from 1; the first step that has an observation is the second.
        """

    def used(self, lr: float, step: int) -> float:
        """The rate that step ``t`` is taken with, where it is not ``α_t`` itself."""
        return lr

    def discount(self, step: int) -> float:
        """``μ_t`` of the discounted sum of directions, for a rule with :attr:`long_horizon`."""
        raise NotImplementedError(f"{type(self).__name__} has a long horizon and must say how it discounts")

    def start(self, param_norm: float, direction_norm: float) -> float:
        """The first rate ``α_1`` from ``‖θ_0‖`` and ``‖d_1‖``, for a rule with :attr:`picks_start`."""
        raise NotImplementedError(f"{type(self).__name__} picks its first rate and must say which")

    def check_start(self, lr: float) -> None:  # noqa: B027
        """Raise :class:`ValueError` where the rule cannot work from the configured rate ``lr``."""

    def bind(self, normalized: bool) -> "Rule":
        """A copy of the rule for one scope.

        Args:
            normalized: Whether the optimizer divides the gradient by its scale (Adam and its like), rather than taking
                steps proportional to it (SGD).
        """
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """The numbers and tensors that the rule object holds, by attribute name; override it for anything else."""
        held = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, Tensor))}
        return copy.deepcopy(held)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        vars(self).update(copy.deepcopy(state_dict))


@dataclass
class _PaperRule(Rule):
    """What the paper's two rules share: β and the transition to a fixed rate."""

    hypergrad_lr: float | None = None
    limit_lr: float | None = None
    weight: Callable[[int], float] = inverse_square

    def __post_init__(self) -> None:
        if self.hypergrad_lr is not None:
            self.hypergrad_lr = check_number("hypergrad_lr", self.hypergrad_lr, minimum=0.0)
        if self.limit_lr is not None:
            self.limit_lr = check_number("limit_lr", self.limit_lr)
        if not callable(self.weight):
            raise TypeError(f"weight must be a function of the step, got {self.weight!r}")

    def used(self, lr: float, step: int) -> float:
        if self.limit_lr is None:
            return lr
        weight = self.weight(step)
        return weight * lr + (1 - weight) * self.limit_lr

    def bind(self, normalized: bool) -> "_PaperRule":
        bound = copy.deepcopy(self)
        if bound.hypergrad_lr is None:
            bound.hypergrad_lr = self.default_hypergrad_lr(normalized)
        return bound

    def state_dict(self) -> dict[str, Any]:
        """Nothing: these rules learn no numbers, and β may be another after a restart."""
        return {}

    @staticmethod
    @abstractmethod
    def default_hypergrad_lr(normalized: bool) -> float:
        """β where the user names none."""


@dataclass
class Additive(_PaperRule):
    r"""The paper's main rule, ``α_t = α_{t-1} - β h_t`` (Section 3, "additive").

    Args:
        hypergrad_lr: ``β ≥ 0``. Its unit is that of α over that of h, so it depends on the scale of the loss. ``None``:
            the values of the paper's experiments with logistic regression and multi-layer networks (Section 4), 1e-3
            for optimizers whose steps are proportional to the gradient (SGD with or without momentum) and 1e-7 for all
            others (the paper's Adam).
        limit_lr: ``α_∞`` of the paper's transition to a fixed rate, ``γ_t = δ(t) α_t + (1 - δ(t)) α_∞`` (Section 5):
            step ``t`` is taken with ``γ_t`` while ``α_t`` goes on as without it. With a scheduler, it is the limit at
            the schedule's peak. ``None``: no transition.
        weight: ``δ(t)``, a function of the step (counted from 1) with ``δ(1) = 1`` that goes to 0.

    Raises:
        TypeError: An argument is not a number, or ``weight`` not a function.
        ValueError: ``hypergrad_lr`` is negative, or an argument not finite.
    """

    def update(self, lr: float, seen: Observation, step: int) -> float:
        """``α_t = α_{t-1} - β h_t``."""
        assert self.hypergrad_lr is not None, "bind() sets it"
        return lr - self.hypergrad_lr * seen.hypergradient

    @staticmethod
    def default_hypergrad_lr(normalized: bool) -> float:
        """1e-3, or 1e-7 for optimizers that normalize the gradient."""
        return 1e-7 if normalized else 1e-3


@dataclass
class Multiplicative(_PaperRule):
    """The paper's multiplicative rule, ``α_t = α_{t-1} (1 - β' h_t / (‖g_t‖ ‖∂u_{t-1}/∂α‖))`` (Section 3).

    The fraction is minus the cosine between the new gradient and the last direction, so the rule does not depend on the
    scale of the loss, and α changes by at most a factor of ``1 ± β'`` a step.

    Args:
        hypergrad_lr: ``β' ≥ 0``, without unit. ``None``: 0.1. The paper gives no value; with this one 580 steps on
            scikit-learn's digits repaired a rate of 1e-5 for SGD, heavy ball and Adam, while 0.02 was too slow for
            plain SGD.
        limit_lr: As in :class:`Additive`.
        weight: As in :class:`Additive`.

    Raises:
        TypeError: An argument is not a number, or ``weight`` not a function.
        ValueError: ``hypergrad_lr`` is negative, or an argument not finite.
    """

    def update(self, lr: float, seen: Observation, step: int) -> float:
        """``α_t = α_{t-1} (1 + β' cos(g_t, d_{t-1}))``."""
        assert self.hypergrad_lr is not None, "bind() sets it"
        return lr * (1 + self.hypergrad_lr * seen.cosine)

    def check_start(self, lr: float) -> None:
        """Raise :class:`ValueError` for a rate of 0, which a product never leaves."""
        if lr == 0:
            raise ValueError(
                "rule 'multiplicative' cannot leave a learning rate of 0: configure a positive lr in the optimizer, or "
                "use rule='additive'"
            )

    @staticmethod
    def default_hypergrad_lr(normalized: bool) -> float:
        """0.1 for every optimizer."""
        return 0.1


RULES: dict[str, type[_PaperRule]] = {"additive": Additive, "multiplicative": Multiplicative}


def make_rule(rule: str | Rule, hypergrad_lr: float | None) -> Rule:
    """The rule that the arguments of the public classes name.

    Raises:
        TypeError: ``rule`` is neither a name nor a :class:`Rule`.
        ValueError: No rule has that name, or ``hypergrad_lr`` comes beside a rule object that carries its own.
    """
    if isinstance(rule, Rule):
        if hypergrad_lr is not None:
            raise ValueError(
                f"hypergrad_lr={hypergrad_lr} beside a rule object has no effect: give it to the {type(rule).__name__} "
                "itself"
            )
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be one of {sorted(RULES)} or a Rule object, got {rule!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)} or a Rule object, got {rule!r}")
    return RULES[rule](hypergrad_lr=hypergrad_lr)


def check_number(name: str, value: float, minimum: float = -math.inf) -> float:
    """``value`` as a finite float that is at least ``minimum``.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not finite, or below ``minimum``.
    """
    try:
        if isinstance(value, (bool, str, Tensor)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or number < minimum:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number
