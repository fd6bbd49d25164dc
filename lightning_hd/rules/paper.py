"""The paper's two rules, additive and multiplicative, and its transition to a fixed rate.

Source: Section 3 and Section 5 of "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin, Cornish,
Martínez Rubio, Schmidt, Wood; ICLR 2018; arXiv 1703.04782).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_hd.checks import check_number
from lightning_hd.rules.base import Context, Observation, Rule


def inverse_square(step: int) -> float:
    """``δ(t) = 1/t²``, the weight that the paper proposes for its transition to a fixed rate (Section 5)."""
    return step**-2


@dataclass
class _PaperRule(Rule):
    """What the paper's two rules share: β and the transition to a fixed rate."""

    hypergrad_lr: float | None = None
    limit_lr: float | None = None
    weight: Callable[[int], float] = inverse_square

    defaults: ClassVar[tuple[float, float]]
    """β if the user gives none, for optimizers that follow the gradient, and for those that normalize it."""

    def __post_init__(self) -> None:
        if self.hypergrad_lr is not None:
            self.hypergrad_lr = check_number("hypergrad_lr", self.hypergrad_lr, minimum=0.0)
        if self.limit_lr is not None:
            self.limit_lr = check_number("limit_lr", self.limit_lr)
        if not callable(self.weight):
            raise TypeError(f"weight must be a function of the step, got {self.weight!r}")

    def used(self, lr: float, context: Context) -> float:
        if self.limit_lr is None:
            return lr
        weight = self.weight(context.step)
        return weight * lr + (1 - weight) * self.limit_lr

    def bind(self, normalized: bool) -> "_PaperRule":
        bound = copy.deepcopy(self)
        if bound.hypergrad_lr is None:
            bound.hypergrad_lr = self.defaults[normalized]
        return bound

    def state_dict(self) -> dict[str, Any]:
        """Nothing, because these rules learn no numbers. β may change when a run is resumed."""
        return {}


@dataclass
class Additive(_PaperRule):
    r"""The paper's main rule, ``α_t = α_{t-1} - β h_t`` (Section 3, "additive").

    Args:
        hypergrad_lr: ``β ≥ 0``. Its unit is that of ``α`` over that of ``h``, so it depends on the scale of the loss.
            ``None``: the values of the paper's experiments with logistic regression and multi-layer networks
            (Section 4). They are 1e-3 for optimizers whose steps are proportional to the gradient (SGD with or without
            momentum) and 1e-7 for all others (the paper's Adam).
        limit_lr: ``α_∞`` of the paper's transition to a fixed rate, ``γ_t = δ(t) α_t + (1 - δ(t)) α_∞`` (Section 5).
            Step ``t`` is taken with ``γ_t``, and ``α_t`` goes on as without a transition. With a scheduler, ``α_∞`` is
            the limit at the schedule's peak. ``None``: no transition.
        weight: ``δ(t)``, a function of the step, which is counted from 1. It has ``δ(1) = 1`` and goes to 0.

    Raises:
        TypeError: An argument is not a number, or ``weight`` not a function.
        ValueError: ``hypergrad_lr`` is negative, or an argument not finite.
    """

    defaults = (1e-3, 1e-7)

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        """``α_t = α_{t-1} - β h_t``."""
        assert self.hypergrad_lr is not None, "bind() sets it"
        return lr - self.hypergrad_lr * seen.hypergradient


@dataclass
class Multiplicative(_PaperRule):
    """The paper's multiplicative rule, ``α_t = α_{t-1} (1 - β' h_t / (‖g_t‖ ‖∂u_{t-1}/∂α‖))`` (Section 3).

    The fraction is minus the cosine between the new gradient and the last direction. So the rule does not depend on the
    scale of the loss, and ``α`` changes by a factor from ``1 - β'`` to ``1 + β'`` per step.

    Args:
        hypergrad_lr: ``β' ≥ 0``, without unit. ``None``: 0.1. The paper gives no value. With 0.1, 580 steps on
            scikit-learn's digits repaired a rate of 1e-5 for SGD, heavy ball and Adam. With 0.02, plain SGD was too
            slow.
        limit_lr: As in ``Additive``.
        weight: As in ``Additive``.

    Raises:
        TypeError: An argument is not a number, or ``weight`` not a function.
        ValueError: ``hypergrad_lr`` is negative, or an argument not finite.
    """

    defaults = (0.1, 0.1)

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        """``α_t = α_{t-1} (1 + β' cos(g_t, d_{t-1}))``."""
        assert self.hypergrad_lr is not None, "bind() sets it"
        return lr * (1 + self.hypergrad_lr * seen.cosine)

    def check_start(self, lr: float) -> None:
        """Raise ``ValueError`` for a rate of 0, which a product never leaves."""
        if lr == 0:
            raise ValueError(
                "rule 'multiplicative' cannot leave a learning rate of 0: configure a positive lr in the optimizer, or "
                "use rule='additive'"
            )


PAPER_RULES: dict[str, type[_PaperRule]] = {"additive": Additive, "multiplicative": Multiplicative}
