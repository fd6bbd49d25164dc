"""What follows from the class of an optimizer: whether it can be tuned, and what its step does with a gradient."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from lightning_hd.rules import Rule

_COUPLED: tuple[type[Optimizer] | None, ...] = (SGD, Adam, ASGD, Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop)
"""Optimizers whose ``weight_decay`` adds ``λ θ`` to the gradient, unless the group sets ``decoupled_weight_decay``."""

_REFUSED = {
    LBFGS: "its step is the outcome of a line search, not a multiple of the learning rate",
    Rprop: "its step sizes do not depend on the learning rate after the first step",
    SparseAdam: "sparse gradients are not supported",
}


def torch_class(optimizer_class: type[Optimizer]) -> type[Optimizer] | None:
    """The class of torch.optim whose ``step`` this class uses; ``None`` where it has a step of its own."""
    for base in optimizer_class.__mro__:
        if issubclass(base, Optimizer) and base.__module__.startswith("torch.optim.") and base is not Optimizer:
            # torch wraps the step of each class that is instantiated, in order to run the hooks
            return base if inspect.unwrap(optimizer_class.step) is inspect.unwrap(base.step) else None
    return None


def is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the group's ``weight_decay`` is an L2 penalty in the objective rather than a part of the step.

    In classes with a ``step`` of their own it counts as a part of the step, as it is in most recent optimizers.
    """
    coupled = torch_class(type(optimizer)) in _COUPLED
    return coupled and not group.get("decoupled_weight_decay", False)


def coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """``λ`` of the L2 penalty that the optimizer adds to the objective of a group."""
    weight_decay = float(group.get("weight_decay", 0.0))
    return weight_decay if weight_decay and is_coupled(optimizer, group) else 0.0


def objective_gradient(
    optimizer: Optimizer, group: dict[str, Any], g: Tensor, p: Callable[[], Tensor], grad_scale: Tensor | None
) -> Tensor:
    """``g_t``: the gradient of the objective that the optimizer minimizes.

    Args:
        optimizer: The optimizer.
        group: The parameter group.
        g: The gradient from backpropagation. It must not be written to.
        p: Returns the parameters, in the shape of ``g``.
        grad_scale: The factor that a GradScaler has left in the gradient, or ``None``.
    """
    if grad_scale is not None:
        g = g / grad_scale.to(g.device)
    if group.get("maximize", False):
        g = -g
    decay = coupled_decay(optimizer, group)
    return g.add(p(), alpha=decay) if decay else g


def device_of(optimizer: Optimizer) -> torch.device:
    """The device of the first parameter, on which sums are computed."""
    device: torch.device = next(p.device for group in optimizer.param_groups for p in group["params"])
    return device


def follow_rate(optimizer: Optimizer, group: dict[str, Any], lr: float) -> None:
    """Make the next step use ``lr``, also in ASGD, which has derived its rate at the end of the step before."""
    if torch_class(type(optimizer)) is ASGD:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "eta" in state:
                decay, power = float(group["lambd"]), float(group["alpha"])
                state["eta"].fill_(lr / (1 + decay * lr * float(state["step"])) ** power)


def check_gradients(parameters: Iterable[Tensor]) -> None:
    """Raise ``TypeError`` if a gradient is sparse."""
    for p in parameters:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has a gradient of layout {p.grad.layout}: sparse gradients are "
                "not supported. Please build the embedding with sparse=False"
            )


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper that imitates its class, as the wrappers of Lightning and Fabric do."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and isinstance(optimizer, type(inner)) and type(optimizer) is not type(inner):
        return inner
    return optimizer


def is_normalized(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides the gradient by its scale, as Adam does, rather than following it, as SGD does."""
    return not isinstance(optimizer, (SGD, ASGD))


def set_rounding(rule: Rule, optimizer: Optimizer) -> None:
    """Give a rule the relative rounding of gradients, which is that of float64 if all parameters are so precise."""
    parameters = [p for settings in optimizer.param_groups for p in settings["params"]]
    exact = [p.dtype for p in parameters if p.is_floating_point() or p.is_complex()]
    eps = max((torch.finfo(dtype).eps for dtype in exact), default=rule.rounding)
    if eps < rule.rounding:
        rule.rounding = eps


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that this optimizer can be tuned.

    Raises:
        TypeError: It is not a ``torch.optim.Optimizer``, it has no learning rate to tune (LBFGS, Rprop, SparseAdam), it
            is a wrapper whose steps cannot be seen or that was not initialized, or its parameters are flat
            (FullyShardedDataParallel without ``use_orig_params``).
        ValueError: It has no parameter group, a group without ``lr``, or one with a parameter twice.
    """
    if not isinstance(optimizer, Optimizer):
        hint = ". A LightningModule is tuned by the callback HypergradientDescent, in a Trainer"
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            + hint * isinstance(optimizer, nn.Module)
        )
    name = type(optimizer).__name__
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise TypeError(
                f"optimizer {name} has no learning rate to tune: {reason}. Use SGD, Adam, AdamW or the like"
            )
    # The class goes by its name, because its import makes torch warn.
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise TypeError(
            f"optimizer {name} is not supported: its checkpoints lack what is not its own. Shard the model with "
            "torch.distributed.fsdp.fully_shard instead"
        )
    _check_initialized(optimizer)
    if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
        raise TypeError(
            f"optimizer {name} is stepped by its first_step and second_step, which cannot be seen from outside. "
            + inner_optimizers(optimizer)
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
                f"optimizer {name} has flat parameters (FullyShardedDataParallel), of which groups cannot be told "
                "apart: pass use_orig_params=True, or shard the model with torch.distributed.fsdp.fully_shard"
            )


def _check_initialized(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` if the base class was not initialized, because the hooks would not work."""
    try:
        for register in (
            optimizer.register_step_pre_hook,
            optimizer.register_step_post_hook,
            optimizer.register_state_dict_post_hook,
            optimizer.register_load_state_dict_pre_hook,
        ):
            register(lambda *_: None).remove()
        initialized = hasattr(optimizer, "state") and hasattr(optimizer, "defaults")
    except AttributeError:
        initialized = False
    if not initialized:
        raise TypeError(
            f"optimizer {type(optimizer).__name__} was not initialized: its class must call "
            "super().__init__(params, defaults). " + inner_optimizers(optimizer)
        )


def inner_optimizers(optimizer: Optimizer) -> str:
    """Advice to tune the optimizers that are attributes of this one; empty if there are none."""
    inner = {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}
    return " ".join(
        f"Tune the optimizer inside of it, {type(value).__name__}: its attribute {name!r}"
        for name, value in inner.items()
    )
