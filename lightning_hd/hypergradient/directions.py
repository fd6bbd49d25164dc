"""Update directions: ``d_t`` of each optimizer family, as formulas on flat vectors, so that ``∂u_t/∂α = -d_t``.

| optimizer                   | d_t                                               | where it is found               |
|-----------------------------|---------------------------------------------------|---------------------------------|
| SGD                         | g_t                                               | one copy                        |
| SGD, Nesterov               | g_t + μ v_t                                       | one copy, and the momentum      |
| SGD, heavy ball             | v_t = μ v_{t-1} + (1-τ) g_t                       | the optimizer's momentum buffer |
| Adam, AdamW (and amsgrad)   | m̂_t / (√v̂_t + ε), plus λ θ_{t-1} where decoupled | the optimizer's m and v         |
| ASGD                        | g_t + λ θ_{t-1}                                   | one copy                        |
| any other                   | (θ_{t-1} - θ_t) / α_t                             | measured, one copy              |

Coupled (L2) weight decay is part of the objective, so ``g_t`` includes it; ``maximize`` flips the sign of ``g_t``.
Sources: "Online Learning Rate Adaptation with Hypergradient Descent" (arXiv 1703.04782), algorithms SGD-HD, SGDN-HD and
Adam-HD; the formulas of d in the documentation of ``torch.optim``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer

from lightning_hd.checks import check_fields
from lightning_hd.optimizers import is_coupled, torch_class

COPY, PARAMETER = "copy", "parameter"
"""What a direction may ask for, beside the tensors of the optimizer's state by their names."""

Quantities = Callable[[str], Tensor]
"""Gives a quantity by its name: a flat tensor of at least 32 bits per element, which must not be written to."""

State = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Direction(ABC):
    """How ``d_t`` of one parameter group is computed, for the hyperparameters of the current step."""

    counts: ClassVar[bool] = False
    """Whether the direction depends on how many steps the optimizer has taken."""

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The names of the tensors that ``read`` needs of each parameter, and that are in memory after the step.

        ``COPY`` is among them where the optimizer's own state does not hold ``d_t``.
        """

    @abstractmethod
    def read(self, get: Quantities, step: int) -> Tensor:
        """``d_t`` over its ``factor``, at any time after step ``t`` and before the next.

        It is a flat tensor, which must not be written to.

        Args:
            get: Gives the quantities.
            step: ``t``, as the optimizer counts it for these parameters.
        """

    def factor(self, step: int) -> float:
        """What ``read`` leaves out, because it is cheaper to multiply sums than vectors.

        Args:
            step: ``t``, as in ``read``.
        """
        return 1.0

    def ahead(self, g: Tensor, p: Tensor, state: State) -> Tensor | None:
        """``d`` of the next step, before it is taken; ``None`` where it cannot be known.

        All tensors belong to one parameter. They are real, and must not be written to.

        Args:
            g: The gradient, of at least 32 bits per element.
            p: The parameter.
            state: Returns a tensor of the optimizer's state by its name, or ``None``.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers from which ``from_dict`` builds the direction again."""
        return {"family": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "Direction":
        """The inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: It does not describe a direction.
        """
        return check_fields({cls.__name__: cls for cls in Direction.__subclasses__()}[saved["family"]], saved)


@dataclass(frozen=True)
class Gradient(Direction):
    """SGD without momentum, SGD with Nesterov's momentum, and ASGD: ``d_t = g_t + μ v_t + λ θ_{t-1}``.

    The copy holds ``g_t + λ θ_{t-1}``. ASGD moves by a rate that decays, ``η_t = lr / (1 + λ lr t)^power``. Its
    direction is taken with respect to ``η_t``, which equals the learning rate while ``λ lr t`` is small.
    """

    nesterov: float = 0.0
    decay: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        """The copy, and the buffer of Nesterov's momentum."""
        return (COPY, "momentum_buffer") if self.nesterov else (COPY,)

    def read(self, get: Quantities, step: int) -> Tensor:
        """The copy plus ``μ`` times the momentum buffer."""
        g = get(COPY)
        return torch.add(g, get("momentum_buffer"), alpha=self.nesterov) if self.nesterov else g

    def ahead(self, g: Tensor, p: Tensor, state: State) -> Tensor | None:
        """``g + μ (μ v + g) + λ θ``."""
        v = state("momentum_buffer") if self.nesterov else None
        d = g * (1 + self.nesterov)
        d = d if v is None else d.add_(v, alpha=self.nesterov**2)
        return d.add_(p, alpha=self.decay) if self.decay else d


@dataclass(frozen=True)
class HeavyBall(Direction):
    """SGD with momentum: ``d_t = v_t``, which is the optimizer's momentum buffer."""

    momentum: float
    dampening: float

    needs = ("momentum_buffer",)

    def read(self, get: Quantities, step: int) -> Tensor:
        """The optimizer's own buffer."""
        return get("momentum_buffer")

    def ahead(self, g: Tensor, p: Tensor, state: State) -> Tensor | None:
        """``μ v + (1-τ) g``, but ``g`` in the first step: the dampening acts from the second one on."""
        v = state("momentum_buffer")
        return g if v is None else (v * self.momentum).add_(g, alpha=1 - self.dampening)


@dataclass(frozen=True)
class AdaptiveMoments(Direction):
    """Adam and AdamW: ``d_t = m̂_t / (√v̂_t + ε)``, plus ``λ θ_{t-1}`` where the weight decay is decoupled.

    ``θ_{t-1}`` is not kept. With ``θ_t = θ_{t-1} - α (a + λ θ_{t-1})``, where ``a`` is Adam's part,
    ``d_t = (a + λ θ_t) / (1 - α λ)``. So code that moves the parameters between two steps, such as weight clipping,
    changes the part that is due to weight decay.
    """

    counts: ClassVar[bool] = True
    lr: float
    beta1: float
    beta2: float
    eps: float
    decoupled: float
    amsgrad: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """The optimizer's m and v."""
        return ("exp_avg", "max_exp_avg_sq" if self.amsgrad else "exp_avg_sq")

    def read(self, get: Quantities, step: int) -> Tensor:
        """Computed from the optimizer's m and v: ``m / (√v + ε √(1-β2^t))``, and ``λ θ_t`` over the correction."""
        first, second = self.needs
        scale = torch.sqrt(get(second)).add_(self.eps * (1 - self.beta2**step) ** 0.5)
        d = torch.div(get(first), scale, out=scale)
        return d.add_(get(PARAMETER), alpha=self.decoupled / self._correction(step)) if self.decoupled else d

    def factor(self, step: int) -> float:
        """``√(1-β2^t) / (1-β1^t)``, which corrects m and v for their start at 0, over ``1 - α λ``."""
        return self._correction(step) / (1 - self.lr * self.decoupled)

    def _correction(self, step: int) -> float:
        return float((1 - self.beta2**step) ** 0.5 / (1 - self.beta1**step))

    def ahead(self, g: Tensor, p: Tensor, state: State) -> Tensor | None:
        """The same as ``read``, from the m and v after the next step."""
        moments = {name: state(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")}
        first, second, largest, step = moments.values()
        m = g * (1 - self.beta1) if first is None else (first * self.beta1).add_(g, alpha=1 - self.beta1)
        v = g.square() * (1 - self.beta2)
        v = v if second is None else v.add_(second, alpha=self.beta2)
        v = torch.maximum(v, largest) if self.amsgrad and largest is not None else v
        made = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v, PARAMETER: p}
        count = 1 + (0 if step is None else int(step))
        return self.read(made.__getitem__, count).mul_(self.factor(count))


@dataclass(frozen=True)
class Measured(Direction):
    """Any optimizer whose step is linear in its rate: ``d_t = (θ_{t-1} - θ_t) / α_t`` is measured from its last step.

    The copy holds the numerator. The resolution is that of the parameter's dtype: a step that vanishes in rounding has
    no direction.
    """

    lr: float

    needs = (COPY,)

    def read(self, get: Quantities, step: int) -> Tensor:
        """The difference over ``α_t``. At a rate of 0 there was no step, and the difference is 0."""
        return get(COPY) / self.lr if self.lr else get(COPY)


def direction_of(optimizer: Optimizer, group: dict[str, Any], lr: float) -> Direction:
    """How ``d_t`` is computed for the next step of ``optimizer``.

    Args:
        optimizer: The optimizer. A subclass with a ``step`` of its own counts as unknown.
        group: One of its parameter groups, with the hyperparameters that the step will use.
        lr: The effective learning rate of the step.
    """
    family = torch_class(type(optimizer))
    if family is SGD:
        if group["momentum"] and not group["nesterov"]:
            return HeavyBall(float(group["momentum"]), float(group["dampening"]))
        return Gradient(nesterov=float(group["momentum"]) if group["nesterov"] else 0.0)
    if family is ASGD:
        return Gradient(decay=float(group["lambd"]))
    if family in (Adam, AdamW):
        beta1, beta2 = map(float, group["betas"])
        decoupled = 0.0 if is_coupled(optimizer, group) else float(group["weight_decay"])
        return AdaptiveMoments(lr, beta1, beta2, float(group["eps"]), decoupled, bool(group["amsgrad"]))
    return Measured(lr)
