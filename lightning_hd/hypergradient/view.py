"""View: the base class of what an engine sees of the model before each step."""

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.hypergradient.probe import Slot
from lightning_hd.hypergradient.tables import Tables
from lightning_hd.notices import Notices
from lightning_hd.optimizers import device_of
from lightning_hd.processes import Ranks


class Kept(NamedTuple):
    """What a rule with a long horizon lets the view keep of a step: ``φ_t``, and ``w_t`` (see ``Rule.smoothing``)."""

    moves: float
    smoothing: float


class View(ABC):
    """What an engine sees of the model around every step: its moves, or the direction of the last step.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.

    Attributes:
        width: How many sums there are for each scope, beside the flags.
    """

    width = 3

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
        factors: Sequence[tuple[float, ...]],
        scopes: Sequence[int],
        with_gradient: set[int],
        known: set[int],
        joined: Container[int] = (),
    ) -> Tensor:
        """The sums of buckets by scope, with three flags; see ``observe``. ``joined`` has scopes, the others groups."""
        flagged = [{scopes[i] for i in groups} for groups in (with_gradient, known)]
        flags = [(scope in flagged[0], scope in flagged[1], scope in joined) for scope in range(max(scopes) + 1)]
        return self._tables.combine(sums, factors, flags, device_of(self._optimizer), self.width)

    @abstractmethod
    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """What this rank sees before a step. The sums over all ranks are what counts.

        Args:
            scopes: The scope of each parameter group.
            grad_scale: The factor that a GradScaler has left in the gradients, or ``None``.
            wide: Whether to compute products in float64, if the view does not do so anyway.

        Returns:
            Numbers for each scope, of shape (scopes, 6) or more. The first are the derivative, ``‖g‖²``, and the
            squared norm of the direction or the sum of moves; then come those that ``further`` is for. The last three
            are flags: whether there is a gradient, whether there is a direction or move, and whether a large part of
            the parameters is new.
        """

    def further(self, sums: Sequence[float]) -> dict[str, float]:
        """What an observation has beside the derivative and two norms, from the sums of a scope over all ranks."""
        return {}

    @abstractmethod
    def keep(self, group: int, lr: float, weight: float) -> None:
        """Prepare for the update of a group.

        Args:
            group: The parameter group.
            lr: Its rate.
            weight: The derivative of its rate with respect to the rate of its scope.
        """

    @abstractmethod
    def remember(self, kept: Sequence[Kept | None]) -> None:
        """Remember a step that was taken.

        Args:
            kept: For each scope, what is kept of former moves; ``None``: what it saw was not finite.
        """

    def forget(self, scope: int) -> None:  # noqa: B027
        """Forget the moves of a scope, whose rate starts anew in the next step."""

    @abstractmethod
    def abandon(self) -> None:
        """Drop what was kept of a step that was not taken."""

    def start(self) -> None:  # noqa: B027
        """Prepare for a first step. It is not called if a state was loaded."""

    @abstractmethod
    def pause(self) -> None:
        """Prepare for steps that are not seen."""

    @abstractmethod
    def make_room(self) -> None:
        """Make the tensors that are saved with the optimizer, before the first step."""

    @abstractmethod
    def state_dict(self) -> Any:
        """What is remembered."""

    @abstractmethod
    def load_state_dict(self, state_dict: Any) -> None:
        """Load what ``state_dict`` returned. It raises an error of any kind if the state is damaged."""

    def is_doubtful(self, sums: Sequence[Sequence[float]]) -> bool:
        """Whether these sums must be computed again in float64."""
        return False

    def measured(self, group: int) -> bool:
        """Whether a group's last step was measured, so that it may have vanished in rounding."""
        return False
