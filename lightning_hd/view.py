"""What a view is: how an engine sees, before each step, what the rule asks for."""

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.notices import Notices
from lightning_hd.optimizers import device_of
from lightning_hd.probe import Slot
from lightning_hd.reduction import Ranks
from lightning_hd.tables import Tables


class View(ABC):
    """What is looked at around every step of an optimizer: its moves, or the direction of its last step.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: For what the user should know.
    """

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        self._optimizer = optimizer
        self._budget = budget
        self._ranks = ranks
        self._notices = notices
        self._tables = Tables()
        self.slots: list[Slot] = []

    @property
    def share(self) -> tuple[int, int]:
        """How many coordinates are looked at, and how many there are."""
        return sum(slot.count for slot in self.slots), sum(slot.size for slot in self.slots)

    def _combine(
        self,
        sums: Sequence[Tensor],
        factors: Sequence[tuple[int, float, float, float]],
        scopes: Sequence[int],
        with_gradient: set[int],
        known: set[int],
        joined: Container[int] = (),
    ) -> Tensor:
        """The sums of buckets by scope, with three flags: see ``observe``. ``joined`` are scopes, not groups."""
        flagged = [{scopes[i] for i in groups} for groups in (with_gradient, known)]
        flags = [(scope in flagged[0], scope in flagged[1], scope in joined) for scope in range(max(scopes) + 1)]
        return self._tables.combine(sums, factors, flags, device_of(self._optimizer))

    @abstractmethod
    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """This rank's part of what there is to see before a step.

        Args:
            scopes: The scope of each parameter group.
            grad_scale: The factor that a GradScaler has left in the gradients, or ``None``.
            wide: Whether to compute products in float64, where they are not anyway.

        Returns:
            For each scope the derivative, ``‖g‖²``, the square of what ``g`` is multiplied with, whether there is a
            gradient, whether there is something to multiply it with, and whether parameters have joined that are a
            part of the scope to be reckoned with: of shape (scopes, 6).
        """

    @abstractmethod
    def keep(self, group: int, lr: float, weight: float) -> None:
        """Before the update: the rate of a group, and its derivative with respect to the rate of its scope."""

    @abstractmethod
    def remember(self, kept: Sequence[float | None]) -> None:
        """The step was taken.

        Args:
            kept: For each scope, which part of former moves counts on; ``None``: what it saw was not finite.
        """

    def forget(self, scope: int) -> None:  # noqa: B027
        """What is remembered of a scope does not count any more: its rate starts anew in the step that comes."""

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
        """Take over what ``state_dict`` returned; it raises an error of any kind where that is damaged."""

    def is_doubtful(self, sums: Sequence[Sequence[float]]) -> bool:
        """Whether what was observed must be computed once more, in float64."""
        return False

    def measured(self, group: int) -> bool:
        """Whether a group's last step was measured, so that it may have vanished in rounding."""
        return False
