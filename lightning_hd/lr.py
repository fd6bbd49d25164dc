"""The rate that a parameter group of an optimizer holds: a number, or a tensor of one."""

from typing import Any

from torch import Tensor


def check_lr(name: str, lr: Any) -> None:
    """Raise :class:`TypeError` where it cannot be read as a rate or, being a tensor, cannot hold one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point() or lr.is_meta:
            raise TypeError(
                f"{name} must be a floating-point tensor of one element on a real device, got one of shape "
                f"{tuple(lr.shape)} and {lr.dtype} on '{lr.device}'"
            )
    elif isinstance(lr, str) or not hasattr(lr, "__float__"):
        raise TypeError(f"{name} must be a number or a tensor of one, got {lr!r}")


def get_lr(settings: dict[str, Any]) -> float:
    """The rate that a parameter group of the optimizer holds."""
    return float(settings["lr"])


def set_lr(settings: dict[str, Any], lr: float) -> float:
    """Write it, in place where it is a tensor; returns what the group then holds."""
    if get_lr(settings) != lr:
        if isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(lr)
        else:
            settings["lr"] = lr
    return get_lr(settings)
