"""What a view is: how an engine sees, before each step, what the rule asks for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class View(ABC):
    """What is looked at around every step of an optimizer: its moves, or the direction of its last step."""

    @abstractmethod
    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """This rank's part of what there is to see before a step.

        Args:
            scopes: The scope of each parameter group.
            grad_scale: The factor that a GradScaler has left in the gradients, or ``None``.
            wide: Whether to compute products in float64, where they are not anyway.

        Returns:
            For each scope the derivative, ``‖g‖²``, the square of what ``g`` is multiplied with, whether there is a
            gradient, and whether there is something to multiply it with: of shape (scopes, 5).
        """

    @property
    @abstractmethod
    def share(self) -> tuple[int, int]:
        """How many coordinates are looked at, and how many there are."""

    @abstractmethod
    def keep(self, group: int, lr: float, weight: float) -> None:
        """Before the update: the rate of a group, and its derivative with respect to the rate of its scope."""

    @abstractmethod
    def remember(self, kept: Sequence[float | None]) -> None:
        """The step was taken.

        Args:
            kept: For each scope, which part of former moves counts on; ``None``: what it saw was not finite.
        """

    @abstractmethod
    def abandon(self) -> None:
        """The step was not taken."""

    def start(self) -> None:  # noqa: B027
        """The first step comes, and no state was loaded."""

    @abstractmethod
    def pause(self) -> None:
        """Steps follow that are not seen."""

    @abstractmethod
    def make_room(self) -> None:
        """Make the tensors that are saved with the optimizer, before there are any."""

    @abstractmethod
    def state_dict(self) -> Any:
        """What is remembered."""

    @abstractmethod
    def load_state_dict(self, state_dict: Any) -> None:
        """Take over what :meth:`state_dict` returned; it raises an error of any kind where that is damaged."""

    def is_doubtful(self, sums: Sequence[Sequence[float]]) -> bool:
        """Whether what was observed must be computed once more, in float64."""
        return False

    def measured(self, group: int) -> bool:
        """Whether a group's last step was measured, so that it may have vanished in rounding."""
        return False
