"""View: what an engine sees of the model around every step, whatever the rule needs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.hypergradient.buckets import Sums
from lightning_hd.hypergradient.probe import Slot
from lightning_hd.processes import Notices, Ranks
from lightning_hd.rules import Observation


class Sight(NamedTuple):
    """What a step shows of one scope, on all processes together."""

    has_gradient: bool
    known: bool  # whether there is a direction or a move to compare the gradient with
    observation: Observation
    joined: bool = False  # whether a large part of the parameters is new
    vanished: bool = False  # whether the last step should have moved parameters, but left no trace
    lost: bool = False  # whether nothing is remembered of the moves of any parameter


UNSEEN = Sight(has_gradient=True, known=False, observation=Observation(0.0, 0.0, 0.0))
"""What is seen where nothing is looked at: gradients are taken for granted."""


class Retained(NamedTuple):
    """What is left of former moves when a step is remembered: ``φ_t``, and ``w_t`` (see ``Rule.smoothing``)."""

    moves: float
    smoothing: float


class View(ABC):
    """What an engine sees of the model around every step: its moves, or the direction of the last step.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.
    """

    width: int
    """How many numbers ``observe`` returns for each scope."""

    asleep: Sequence[Tensor] = ()
    """Parameters that needed no gradient in the last look, if that matters to what is seen."""

    unused: Sequence[Tensor] = ()
    """Parameters that need one and never had it, if that matters."""

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        self._optimizer = optimizer
        self.budget = budget
        self._ranks = ranks
        self._notices = notices
        self._sums = Sums()
        self._wide = True  # whether numbers are multiplied in float64
        self._was_wide = True  # the same before a step that runs
        self._choose([])

    def _choose(self, slots: list[Slot]) -> None:
        """Look at these coordinates."""
        self.slots = slots
        self.share = sum(slot.count for slot in slots), sum(slot.size for slot in slots)  # looked at, and of all

    @abstractmethod
    def observe(self, scopes: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
        """What this process sees before a step.

        Args:
            scopes: The scope of each parameter group.
            parameters: Those of the optimizer, in the order of its groups.

        Returns:
            Numbers of each scope, of shape (scopes, n). Their sums over all processes are for ``sights``.
        """

    def note(self, scopes: Sequence[int], parameters: Sequence[Tensor]) -> None:  # noqa: B027
        """Note where gradients and parameters are, in a step that is not looked at, because the next one is.

        Args:
            scopes: The scope of each parameter group.
            parameters: Those of the optimizer, in the order of its groups.
        """

    @abstractmethod
    def sights(self, sums: Sequence[Sequence[float]]) -> list[Sight]:
        """What the step shows of each scope, from the sums over all processes."""

    @abstractmethod
    def prepare(self, lrs: Sequence[float], weights: Sequence[float]) -> None:
        """Prepare for the update.

        Args:
            lrs: The rate of each group.
            weights: The derivative of each rate with respect to the rate of its scope.
        """

    @abstractmethod
    def remember(self, retained: Sequence[Retained | None]) -> None:
        """Remember a step that was looked at and taken.

        Args:
            retained: For each scope, what is left of former moves; ``None``: what it saw was not finite.
        """

    def pass_over(self) -> None:  # noqa: B027
        """A step was taken that was not looked at."""

    @abstractmethod
    def abandon(self) -> None:
        """Drop what was prepared for a step that was not taken."""

    def forget(self, scope: int) -> None:  # noqa: B027
        """Forget the moves of a scope, whose rate starts anew in the next step."""

    def relocate(self) -> None:  # noqa: B027
        """Keep what is known of former moves, but not of places: others have set the parameters to where they are."""

    def start(self) -> None:  # noqa: B027
        """Prepare for a first step. It is not called if a state was loaded."""

    def pause(self) -> None:  # noqa: B027
        """Prepare for steps that are not seen."""

    def make_room(self) -> None:  # noqa: B027
        """Make the tensors that are saved with the optimizer, before the first step."""

    @abstractmethod
    def state_dict(self) -> Any:
        """What is remembered."""

    @abstractmethod
    def load_state_dict(self, state_dict: Any) -> None:
        """Load what ``state_dict`` returned. It raises an error of any kind if the state is damaged."""
