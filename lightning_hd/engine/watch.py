"""Detects gradients that come and go while no step of the optimizer is seen."""

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.notices import Notices
from lightning_hd.processes import is_flat_shard

_GRADIENTS, _PASSES = 20, 1000
"""The warning comes after so many gradients, each a new tensor, or so many backward passes. Gradients are seldom
accumulated for so long."""


class Watch:
    """Warns once if an optimizer seems to be stepped in a way that no hook sees.

    Args:
        optimizer: The optimizer.
        notices: Where warnings go.
    """

    def __init__(self, optimizer: Optimizer, notices: Notices) -> None:
        self._notices = notices
        self._gradients = 0
        self._passes = 0
        self._last: weakref.ref[Tensor] | None = None
        self._handle: RemovableHandle | None = None
        for settings in optimizer.param_groups:
            for p in settings["params"]:
                if self._handle is None and p.requires_grad and p.is_leaf and not is_flat_shard(p):
                    self._handle = p.register_post_accumulate_grad_hook(self._count)

    def end(self) -> None:
        """Stop watching: a step was seen, or none is expected."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches nothing."""
        return {**vars(self), "_last": None, "_handle": None}

    def _count(self, p: Tensor) -> None:
        self._passes += 1
        if p.grad is not None and (self._last is None or self._last() is not p.grad):
            self._gradients += 1
            self._last = weakref.ref(p.grad)
        if self._gradients > _GRADIENTS or self._passes > _PASSES:
            self.end()
            self._notices.warn(
                "no step",
                "gradients came and went, but no step was seen. Call the `step` of this very optimizer. Until then its "
                "learning rate is not tuned",
            )
