"""Update directions: ``d_t`` of each optimizer family, so that ``∂u_t/∂α = -d_t``.

| optimizer                   | d_t                                               | where it is found               |
|-----------------------------|---------------------------------------------------|---------------------------------|
| SGD                         | g_t                                               | one copy                        |
| SGD, Nesterov               | g_t + μ v_t                                       | one copy                        |
| SGD, heavy ball             | v_t = μ v_{t-1} + (1-τ) g_t                       | the optimizer's momentum buffer |
| Adam, AdamW (and amsgrad)   | m̂_t / (√v̂_t + ε), plus λ θ_{t-1} where decoupled | the optimizer's m and v         |
| ASGD                        | g_t + λ θ_{t-1}                                   | one copy                        |
| any other                   | (θ_{t-1} - θ_t) / α_t                             | measured, one copy              |

Coupled (L2) weight decay is part of the objective, so ``g_t`` includes it; ``maximize`` flips the sign of ``g_t``.
Sources: "Online Learning Rate Adaptation with Hypergradient Descent" (arXiv 1703.04782), algorithms SGD-HD, SGDN-HD and
Adam-HD; the formulas of d in the documentation of ``torch.optim``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from lightning_hd.reduction import as_real, widen

DIRECTION = "hd_direction"
"""Key in ``optimizer.state[p]`` of the copy that the families without ``d_{t-1}`` in the optimizer's state keep."""

DISCOUNTED = "hd_discounted"
"""Key in ``optimizer.state[p]`` of the discounted sum of directions, for rules with a long horizon."""

_COUPLED: tuple[type[Optimizer] | None, ...] = (SGD, Adam, ASGD, Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop)
"""Optimizers whose ``weight_decay`` adds ``λ θ`` to the gradient, unless the group says ``decoupled_weight_decay``."""

_REFUSED = {
    LBFGS: "its step is the outcome of a line search, not a multiple of the learning rate",
    Rprop: "its step sizes do not depend on the learning rate after the first step",
    SparseAdam: "sparse gradients are not supported",
}


@dataclass(frozen=True)
class Direction(ABC):
    """How ``d_t`` of one parameter group is found, for the hyperparameters of the step that is being taken."""

    copies: ClassVar[bool] = False
    """Whether a copy of the parameter's size is needed, because the optimizer's own state does not hold ``d_t``."""

    def keep(self, copy: Tensor, p: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Before the update: write what will be needed after it into ``copy``; ``gradient`` makes ``g_t``."""
        raise NotImplementedError(f"{type(self).__name__} keeps no copy")

    def settle(self, copy: Tensor, p: Tensor, state: dict[str, Any]) -> None:
        """After the update: turn what was kept into what :meth:`read` needs, in place."""
        raise NotImplementedError(f"{type(self).__name__} keeps no copy")

    @abstractmethod
    def read(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """``d_t`` of the parameter, at any time after step ``t`` and before the next: real, not to be written to."""

    def correct(self, state: dict[str, Any], lr: float) -> None:  # noqa: B027
        """Correct what the optimizer derived from an earlier rate, for the next step to be taken at ``lr``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers from which :func:`direction_from_dict` builds it again."""
        return {"family": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Gradient(Direction):
    """SGD without momentum, SGD with Nesterov's, and ASGD: ``d_t = g_t + μ v_t + λ θ_{t-1}``.

    ASGD moves by a rate that decays, ``η_t = lr / (1 + λ lr t)^power``; its direction is taken with respect to ``η_t``,
    which equals the learning rate while ``λ lr t`` is small.
    """

    copies: ClassVar[bool] = True
    nesterov: float = 0.0
    decay: float = 0.0
    power: float = 0.0

    def keep(self, copy: Tensor, p: Tensor, gradient: Callable[[], Tensor]) -> None:
        """``g_t + λ θ_{t-1}``."""
        copy.copy_(gradient())
        if self.decay:
            copy.add_(p, alpha=self.decay)

    def settle(self, copy: Tensor, p: Tensor, state: dict[str, Any]) -> None:
        """Add ``μ v_t``, which only the step has made."""
        if self.nesterov:
            copy.add_(state["momentum_buffer"], alpha=self.nesterov)

    def read(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The copy."""
        return as_real(state[DIRECTION])

    def correct(self, state: dict[str, Any], lr: float) -> None:
        """``η_t`` of ASGD, which it derives at the end of a step from the rate that it has then."""
        if "eta" in state:
            state["eta"].fill_(lr / (1 + self.decay * lr * float(state["step"])) ** self.power)


@dataclass(frozen=True)
class HeavyBall(Direction):
    """SGD with momentum: ``d_t = v_t``, which is the optimizer's momentum buffer."""

    def read(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The optimizer's own buffer."""
        return as_real(state["momentum_buffer"])


@dataclass(frozen=True)
class AdaptiveMoments(Direction):
    """Adam and AdamW: ``d_t = m̂_t / (√v̂_t + ε)``, plus ``λ θ_{t-1}`` where the weight decay is decoupled.

    ``θ_{t-1}`` is not kept: with ``θ_t = θ_{t-1} - α (a + λ θ_{t-1})``, ``a`` being Adam's part,
    ``d_t = (a + λ θ_t) / (1 - α λ)``. So whoever moves the parameters between two steps (weight clipping, say) changes
    the part that is due to weight decay.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    decoupled: float
    amsgrad: bool

    def read(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Computed from the optimizer's m and v: a temporary of the size of the parameter."""
        step = float(state["step"])
        v = widen(as_real(state["max_exp_avg_sq" if self.amsgrad else "exp_avg_sq"]))
        m = widen(as_real(state["exp_avg"]))
        scale = v.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        d = torch.div(m, scale, out=scale).div_(1 - self.beta1**step)
        if self.decoupled:
            d.add_(as_real(p), alpha=self.decoupled).div_(1 - self.lr * self.decoupled)
        return d


@dataclass(frozen=True)
class Measured(Direction):
    """Any optimizer whose step is linear in its rate: ``d_t = (θ_{t-1} - θ_t) / α_t``, from the step it just took.

    The measurement has the resolution of the parameter's dtype: a step that vanishes in rounding has no direction.
    """

    copies: ClassVar[bool] = True
    lr: float

    def keep(self, copy: Tensor, p: Tensor, gradient: Callable[[], Tensor]) -> None:
        """``θ_{t-1}``."""
        copy.copy_(p)

    def settle(self, copy: Tensor, p: Tensor, state: dict[str, Any]) -> None:
        """``θ_{t-1} - θ_t``."""
        copy.sub_(p)

    def read(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The difference over ``α_t``: a temporary of the size of the parameter. Without a rate there was no step."""
        difference = widen(as_real(state[DIRECTION]))
        return difference / self.lr if self.lr else difference


_FAMILIES: dict[str, type[Direction]] = {
    family.__name__: family for family in (Gradient, HeavyBall, AdaptiveMoments, Measured)
}


def torch_class(optimizer_class: type[Optimizer]) -> type[Optimizer] | None:
    """The class of torch.optim whose ``step`` this class uses; ``None`` where it has a step of its own."""
    for base in optimizer_class.__mro__:
        if issubclass(base, Optimizer) and base.__module__.startswith("torch.optim.") and base is not Optimizer:
            # torch wraps the step of each class that is instantiated, to run the hooks
            return base if inspect.unwrap(optimizer_class.step) is inspect.unwrap(base.step) else None
    return None


def direction_of(optimizer: Optimizer, group: dict[str, Any], lr: float) -> Direction:
    """How ``d_t`` is found for the step that ``optimizer`` takes next.

    Args:
        optimizer: The optimizer. A subclass with a step of its own counts as unknown, whatever it is a subclass of.
        group: One of its parameter groups, with the hyperparameters that the step will use.
        lr: The effective learning rate of the step.
    """
    family = torch_class(type(optimizer))
    if family is SGD:
        if group["momentum"] and not group["nesterov"]:
            return HeavyBall()
        return Gradient(nesterov=float(group["momentum"]) if group["nesterov"] else 0.0)
    if family is ASGD:
        return Gradient(decay=float(group["lambd"]), power=float(group["alpha"]))
    if family in (Adam, AdamW):
        return AdaptiveMoments(
            lr=lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            decoupled=0.0 if is_coupled(optimizer, group) else float(group["weight_decay"]),
            amsgrad=bool(group["amsgrad"]),
        )
    return Measured(lr=lr)


def direction_from_dict(saved: dict[str, Any]) -> Direction:
    """The inverse of :meth:`Direction.to_dict`.

    Raises:
        ValueError: It does not describe a direction.
    """
    values = dict(saved)
    try:
        return _FAMILIES[values.pop("family")](**values)
    except (KeyError, TypeError):
        raise ValueError(f"not a saved direction: {saved!r}") from None


def is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the group's ``weight_decay`` is an L2 penalty in the objective rather than a part of the step.

    The weight decay of classes with a step of their own is taken for a part of the step, as it is in all recent ones.
    """
    coupled = torch_class(type(optimizer)) in _COUPLED
    return coupled and not group.get("decoupled_weight_decay", False)


def objective_gradient(optimizer: Optimizer, group: dict[str, Any], p: Tensor, grad_scale: Tensor | None) -> Tensor:
    """``g_t`` of one parameter: the gradient of the objective that the optimizer minimizes, at ``θ_{t-1}``.

    Args:
        optimizer: The optimizer about to step.
        group: The parameter's group.
        p: A parameter that has a gradient.
        grad_scale: The factor that a GradScaler has left in the gradient, or ``None``.
    """
    assert p.grad is not None, "the caller passes parameters with a gradient only"
    g = p.grad
    if grad_scale is not None:
        g = g / grad_scale.to(g.device)
    if group.get("maximize", False):
        g = -g
    weight_decay = group.get("weight_decay", 0.0)
    if weight_decay and is_coupled(optimizer, group):
        g = g.add(p, alpha=float(weight_decay))
    return g


def check_gradient(p: Tensor) -> None:
    """Raise :class:`TypeError` where the parameter's gradient is sparse."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} has a gradient of layout {p.grad.layout}: sparse gradients are not "
            "supported; build the embedding with sparse=False"
        )


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of a wrapper that imitates its class, as Lightning and Fabric make them."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and isinstance(optimizer, type(inner)) and type(optimizer) is not type(inner):
        return inner
    return optimizer


def is_normalized(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides the gradient by its scale, as Adam does, rather than following it, as SGD does."""
    return not isinstance(optimizer, (SGD, ASGD))


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise where no direction can be had from this optimizer.

    Raises:
        TypeError: It is not a :class:`torch.optim.Optimizer`, its step is not linear in its rate, or its parameters
            are flat (FullyShardedDataParallel).
        ValueError: It has no parameter group, a group without ``lr``, or one with a parameter twice.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    name = type(optimizer).__name__
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise TypeError(
                f"optimizer {name} has no learning rate to tune: {reason}. Use SGD, Adam, AdamW or the like"
            )
    # By its name, for the import alone makes torch warn.
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise TypeError(
            f"optimizer {name} is not supported: its checkpoints lack what is not its own. Shard the model with "
            "torch.distributed.fsdp.fully_shard instead"
        )
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "defaults"):
        raise TypeError(
            f"optimizer {name} was not initialized: its class must call super().__init__(params, defaults). If it is a "
            "wrapper, tune the optimizer inside of it"
        )
    if not optimizer.param_groups:
        raise ValueError(f"optimizer {name} has no parameter groups")
    for i, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"optimizer {name} has no 'lr' in param_groups[{i}]: there is no learning rate to tune")
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(f"optimizer {name} has a parameter twice in param_groups[{i}]")
        if any(isinstance(p, FlatParameter) for p in group["params"]):
            raise TypeError(
                f"optimizer {name} has flat parameters (FullyShardedDataParallel), which are not supported: shard the "
                "model with torch.distributed.fsdp.fully_shard"
            )
