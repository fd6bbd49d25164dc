"""The loss of a step, if it is known: a closure returns it, or the training loop reports it."""

from typing import Any

import torch
from torch import Tensor


class Losses:
    """The losses that have become known since the last step. No tensor is read on the host before it is used."""

    def __init__(self) -> None:
        self._reported: list[Tensor | float] = []
        self._returned: Tensor | float | None = None

    def report(self, loss: Tensor | float, keep: bool = True) -> None:
        """Add a loss. Several are averaged.

        Args:
            loss: The loss.
            keep: Whether to keep it for the next step. Otherwise it is only checked.

        Raises:
            TypeError: ``loss`` is neither a real number nor a tensor of one.
        """
        number = _number(loss)
        if number is None:
            raise TypeError(f"loss must be a real number or a tensor of one, got {loss!r}")
        if keep:
            self._reported.append(number)

    def hear(self, returned: Any) -> None:
        """Keep what a closure has returned, if it is a loss. It counts only if no loss is reported."""
        self._returned = _number(returned)

    def take(self, like: Tensor) -> Tensor:
        """Return the sum and the number of the losses, of shape (2,), in a tensor like another one; and forget them."""
        losses = self._reported or ([] if self._returned is None else [self._returned])
        self._reported, self._returned = [], None
        found = [loss.to(like) if isinstance(loss, Tensor) else like.new_full((), loss) for loss in losses]
        return torch.stack([sum(found, start=like.new_zeros(())), like.new_full((), len(found))])

    def state_dict(self) -> list[float]:
        """The losses that were reported for the next step."""
        return list(map(float, self._reported))

    def load_state_dict(self, reported: list[float]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            TypeError: The state is damaged.
        """
        self._reported = []
        for loss in reported:
            self.report(loss)


def _number(value: Any) -> Tensor | float | None:
    if isinstance(value, Tensor):
        usable = value.numel() == 1 and not value.is_complex() and not value.is_meta
        return value.detach().clone().reshape(()) if usable else None  # a copy, because the loss may be written to
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        return None
    return float(value)
