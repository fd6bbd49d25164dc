"""The rate that a parameter group of an optimizer holds: a number, or a tensor of one element."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hd.processes import exact_dtype

LARGEST = torch.finfo(torch.float32).max
"""The largest rate that torch can multiply a float32 tensor with."""


def check_lr(name: str, lr: Any) -> None:
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


def get_lr(settings: dict[str, Any]) -> float:
    """The rate that a parameter group of the optimizer holds."""
    return float(settings["lr"])


def get_lrs(groups: Sequence[dict[str, Any]]) -> list[float]:
    """The rates that some groups hold. Tensors on one device are read at once."""
    tensors = [settings["lr"] for settings in groups if isinstance(settings["lr"], Tensor)]
    if len({tensor.device for tensor in tensors}) != 1:
        return list(map(get_lr, groups))
    numbers = iter(
        torch.stack([tensor.detach().to(exact_dtype(tensor.device)).view(()) for tensor in tensors]).tolist()
    )
    return [next(numbers) if isinstance(settings["lr"], Tensor) else get_lr(settings) for settings in groups]


def set_lr(settings: dict[str, Any], lr: float) -> float:
    """Write a rate into a group, in place if that holds a tensor. Return what the group holds then."""
    held = settings["lr"]
    if isinstance(held, Tensor):
        held.fill_(lr)
    elif get_lr(settings) != lr:
        settings["lr"] = lr
    return as_held(settings, lr)


def as_held(settings: dict[str, Any], lr: float) -> float:
    """What a group holds once this rate is written into it. It does not wait for a device."""
    held = settings["lr"]
    return float(torch.tensor(lr, dtype=held.dtype)) if isinstance(held, Tensor) else lr
