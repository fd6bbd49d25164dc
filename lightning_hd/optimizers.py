"""What is known of torch's optimizers: which can be tuned, what a step does with a gradient, who holds rates."""

import inspect
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import ASGD, LBFGS, SGD, Optimizer, Rprop, SparseAdam

from lightning_hd.checks import class_names
from lightning_hd.processes import exact_dtype

LARGEST = torch.finfo(torch.float32).max
"""The largest rate that torch can multiply a float32 tensor with."""

_COUPLED = {"SGD", "Adam", "ASGD", "Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop"}
"""The classes of torch.optim whose ``weight_decay`` adds ``λ θ`` to the gradient, unless a group sets
``decoupled_weight_decay``."""

_REFUSED = {
    LBFGS: "its step is the outcome of a line search, not a multiple of the learning rate",
    Rprop: "its step sizes do not depend on the learning rate after the first step",
    SparseAdam: "sparse gradients are not supported",
}


def torch_class(optimizer_class: type[Optimizer]) -> type[Optimizer] | None:
    """The class of torch.optim whose ``step`` this class uses; ``None`` where it has a step of its own."""
    for base in optimizer_class.__mro__:
        torchs = f"{base.__module__}.".startswith("torch.optim.")
        if torchs and issubclass(base, Optimizer) and base is not Optimizer:
            # torch wraps the step of each class that is instantiated, in order to run the hooks
            return base if inspect.unwrap(optimizer_class.step) is inspect.unwrap(base.step) else None
    return None


def is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the group's ``weight_decay`` is an L2 penalty in the objective rather than a part of the step.

    In classes with a ``step`` of their own it counts as a part of the step, as it is in most recent optimizers.
    """
    if group.get("decoupled_weight_decay", False):
        return False
    known = torch_class(type(optimizer))
    return known is not None and known.__name__ in _COUPLED


def coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """``λ`` of the L2 penalty that the optimizer adds to the objective of a group."""
    weight_decay = float(group.get("weight_decay", 0.0))
    return weight_decay if weight_decay and is_coupled(optimizer, group) else 0.0


def changes_gradients(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether ``to_objective`` changes the gradients of a group."""
    scales = getattr(optimizer, "grad_scale", None) is not None
    return scales or group.get("maximize", False) or coupled_decay(optimizer, group) != 0


def to_objective(
    optimizer: Optimizer, group: dict[str, Any], gradients: list[Tensor], parameters: list[Tensor]
) -> None:
    """Turn gradients from backpropagation into ``g_t``, those of the objective that the optimizer minimizes, in place.

    Args:
        optimizer: The optimizer.
        group: The parameter group.
        gradients: The gradients of some of its parameters, or parts of them.
        parameters: The same parts of the parameters.
    """
    # A GradScaler sets this attribute during the step of a fused optimizer, which unscales by itself.
    scale = getattr(optimizer, "grad_scale", None)
    # torch has no public function that changes many tensors at once.
    if scale is not None:
        torch._foreach_div_(gradients, scale.to(gradients[0].device))
    if group.get("maximize", False):
        torch._foreach_neg_(gradients)
    decay = coupled_decay(optimizer, group)
    if decay:
        torch._foreach_add_(gradients, parameters, alpha=decay)


def device_of(optimizer: Optimizer) -> torch.device:
    """The device of the first parameter, on which sums are computed; the CPU if there is none."""
    return next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))


def check_gradients(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` if a gradient is sparse, or on the meta device."""
    for p in parameters_of(optimizer):
        if p.grad is not None and p.is_meta:
            raise TypeError(f"a parameter of shape {tuple(p.shape)} is on the meta device, where it has no numbers")
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


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def group_names(optimizer_name: str, optimizer: Optimizer) -> list[str]:
    """A name for each parameter group: the optimizer's, then ``/`` and the group's ``name``, or ``pg1``, ``pg2``, ….

    A single group without a name has the name of its optimizer. If names are not unique, they do not count.
    """
    groups = optimizer.param_groups
    if len(groups) == 1 and "name" not in groups[0]:
        return [optimizer_name]
    names = [str(group.get("name", f"pg{i}")) for i, group in enumerate(groups, start=1)]
    if len(set(names)) < len(names):
        names = [f"pg{i}" for i in range(1, len(groups) + 1)]
    return [f"{optimizer_name}/{name}" for name in names]


def rounding_of(optimizer: Optimizer) -> float:
    """The relative rounding of the narrowest parameters."""
    dtypes = {p.dtype for p in parameters_of(optimizer) if p.is_floating_point() or p.is_complex()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def get_lr(group: dict[str, Any]) -> float:
    """The rate that a parameter group holds."""
    return float(group["lr"])


def get_lrs(groups: Sequence[dict[str, Any]]) -> list[float]:
    """The rates that some groups hold. Tensors on one device are read at once."""
    tensors = [group["lr"] for group in groups if isinstance(group["lr"], Tensor)]
    if len({tensor.device for tensor in tensors}) != 1:
        return [float(group["lr"]) for group in groups]
    numbers = iter(
        torch.stack([tensor.detach().to(exact_dtype(tensor.device)).view(()) for tensor in tensors]).tolist()
    )
    return [next(numbers) if isinstance(group["lr"], Tensor) else get_lr(group) for group in groups]


def read_lrs(optimizer: Optimizer, signed: bool) -> list[float]:
    """The rates that the groups hold, checked.

    Args:
        optimizer: The optimizer.
        signed: Whether a rate may be negative.

    Raises:
        TypeError: One is not a rate.
        ValueError: One is not finite, or negative but may not be.
    """
    for i, group in enumerate(optimizer.param_groups):
        if type(group["lr"]) is not float:  # which is what most hold, in every step
            _check_kind(_name(optimizer, i), group["lr"])
    lrs = get_lrs(optimizer.param_groups)
    for i, lr in enumerate(lrs):
        if not math.isfinite(lr) or (lr < 0 and not signed):
            allowed = "a finite number" + ("" if signed else " of at least 0 (or pass min_lr=None)")
            raise ValueError(f"{_name(optimizer, i)} must be {allowed}, got {lr}")
    return lrs


def _name(optimizer: Optimizer, group: int) -> str:
    return f"lr of {type(optimizer).__name__} param_groups[{group}]"


def _check_kind(name: str, lr: Any) -> None:
    """Raise ``TypeError`` if ``lr`` cannot be read as a rate, or is a tensor that cannot hold one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point() or lr.is_meta:
            raise TypeError(
                f"{name} must be a floating-point tensor of one element on a real device, got one of shape "
                f"{tuple(lr.shape)} and {lr.dtype} on '{lr.device}'"
            )
    elif lr is None:
        raise TypeError(
            f"{name} is None: the optimizer makes its own rate, relative to the size of the parameters, so there is "
            "none to tune. Give it a number (and relative_step=False, where it has that argument)"
        )
    elif isinstance(lr, str) or not hasattr(lr, "__float__"):
        raise TypeError(f"{name} must be a number or a tensor of one, got {lr!r}")


def is_marked(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a scheduler has left its mark in some groups. The mark is saved and loaded with them."""
    return any("initial_lr" in group for group in groups)


def has_scheduler(*optimizers: Optimizer) -> bool:
    """Whether a scheduler of torch was built on one of these. It wraps the step; torch has no public name for that."""
    return any(hasattr(optimizer.step, "_wrapped_by_lr_sched") for optimizer in optimizers)


def set_lr(group: dict[str, Any], lr: float) -> float:
    """Write a rate into a group, in place if that holds a tensor. Return what the group holds then."""
    held = group["lr"]
    if isinstance(held, Tensor):
        held.fill_(lr)
    elif float(held) != lr:
        group["lr"] = lr
    return as_held(group, lr)


def like(held: Tensor | float, lr: float) -> Tensor | float:
    """A rate as a number, or as a tensor like the one that a group holds."""
    return torch.full_like(held, lr) if isinstance(held, Tensor) else lr


def as_held(group: dict[str, Any], lr: float) -> float:
    """What a group holds once this rate is written into it. It does not wait for a device."""
    held = group["lr"]
    return float(torch.tensor(lr, dtype=held.dtype)) if isinstance(held, Tensor) else lr


def put_back(optimizer: Optimizer, during: Sequence[float], before: Sequence[float]) -> bool:
    """Restore the rates in the groups after a step that raised, except for those that were changed in between.

    Args:
        optimizer: The optimizer.
        during: The rates of the step.
        before: The rates to restore.

    Returns:
        Whether all were restored.
    """
    holding = get_lrs(optimizer.param_groups)  # before any is written, because groups may share a tensor
    for group, held, lr, rate in zip(optimizer.param_groups, holding, during, before, strict=False):
        if held == lr:
            set_lr(group, rate)
    return all(held == lr for held, lr in zip(holding, during, strict=False))


def give_back(optimizer: Optimizer, during: Sequence[float], before: Sequence[float]) -> None:
    """Restore the scheduled rates after a step. If the optimizer has lowered its rate, lower them in proportion."""
    holding = get_lrs(optimizer.param_groups)
    for group, held, lr, rate in zip(optimizer.param_groups, holding, during, before, strict=True):
        lowered = held / lr if lr else 1.0
        set_lr(group, rate * lowered if 0 <= lowered < 1 else rate)


def apply_lr(optimizer: Optimizer, index: int, lr: float, held: float) -> float:
    """Make the next step use ``lr`` in a group that holds another rate. Return what the group holds then."""
    group = optimizer.param_groups[index]
    used = set_lr(group, lr)
    if used != held:
        follow_rate(optimizer, group, used)
    return used


def follow_rate(optimizer: Optimizer, group: dict[str, Any], lr: float) -> None:
    """Make the next step use ``lr``, also in ASGD, which has derived its rate at the end of the step before."""
    if isinstance(optimizer, ASGD) and torch_class(type(optimizer)) is ASGD:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "eta" in state:
                decay, power = float(group["lambd"]), float(group["alpha"])
                state["eta"].fill_(lr / (1 + decay * lr * float(state["step"])) ** power)


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
    if "ZeroRedundancyOptimizer" in class_names(optimizer):
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
        _ = optimizer.state, optimizer.defaults
    except AttributeError:
        raise TypeError(
            f"optimizer {type(optimizer).__name__} was not initialized: its class must call "
            "super().__init__(params, defaults). " + inner_optimizers(optimizer)
        ) from None


def inner_optimizers(optimizer: Optimizer) -> str:
    """Advice to tune the optimizers that are attributes of this one; empty if there are none."""
    inner = {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}
    return " ".join(
        f"Tune the optimizer inside of it, {type(value).__name__}: its attribute {name!r}"
        for name, value in inner.items()
    )
