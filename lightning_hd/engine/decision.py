"""What is known of one step of an optimizer while it runs, and what is decided in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_hd.hypergradient import Retained, Sight
from lightning_hd.rules import Observation


class Seen(NamedTuple):
    """What the rules learn from in a step."""

    sights: Sequence[Sight]  # of each scope
    loss: float | None  # the mean of those since the look before, over the processes as well; None: it is not known


class Look(NamedTuple):
    """Whether a step is looked at, and what is new in it."""

    taken: bool
    seen: Seen | None  # by this look, or by one that is read late; None: nothing new
    stride: int  # for how many steps the last look stands


class Before(NamedTuple):
    """What holds without a step that runs; empty between steps."""

    during: Sequence[float] = ()  # the rates of the step
    held: Sequence[float] = ()  # the rates before it
    rules: Sequence[dict[str, Any]] = ()  # the states of the first rules
    anchors: Sequence[dict[str, Any]] = ()  # see ``Step.anchors``

    def lrs(self, holding: Sequence[float]) -> list[float]:
        """The rates of all groups, from what they hold: those before the step, unless others have written since."""
        known = [was if held == lr else held for held, lr, was in zip(holding, self.during, self.held, strict=False)]
        return known + list(holding[len(known) :])


class Decision(NamedTuple):
    """The next rate of a scope."""

    lr: float  # α_t
    used: float  # γ_t


@dataclass
class Step:
    """One call of ``optimizer.step``, from when the gradients are ready until the parameters have moved."""

    number: int  # counted from 1
    look: Look
    sights: Sequence[Sight]  # of each scope
    loss: float | None
    total: float  # after so many steps the rates are to have fallen; infinite if that is not known
    cooldown: float  # the length of the cooldown that is still to come
    factor: float  # of all rates, in the cooldown
    stopped: bool  # whether the learned scales stay as they are
    nonlinear: bool  # whether the optimizer's step is found not to be linear in its rate
    held: list[float]  # what param_groups[i]["lr"] held before
    anchors: Sequence[dict[str, Any]] = ()  # what of each scope a schedule may change in the step, as it was before
    seen: Sequence[Observation | None] = ()  # what each scope learns from; None: there was no step before
    rules: list[dict[str, Any]] = field(default_factory=list)  # the states of the rules before, where they may change
    finite: bool = True  # otherwise a scope stays at its rates
    decisions: list[Decision] = field(default_factory=list)  # of each scope
    retained: list[Retained | None] = field(default_factory=list)  # for each scope, of rules with a long horizon
    picked: set[int] = field(default_factory=set)  # scopes whose first rate is picked in this step
    lrs: list[float] = field(default_factory=list)  # what param_groups[i]["lr"] holds during the update
    weights: list[float] = field(default_factory=list)  # derivative of the group's rate with respect to the scope's
    trial: dict[int, float] = field(default_factory=dict)  # rates of short trial steps, for groups of unknown direction
    awaiting: dict[int, Any] = field(default_factory=dict)  # the outlooks of scopes that get their first rate so
    dependence: float = 1.0  # how much of a trial step depends on its rate
    before: dict[Tensor, Tensor] = field(default_factory=dict)  # θ_{t-1} of the groups on trial
    left_out: dict[Tensor, Tensor | None] = field(default_factory=dict)  # gradients that the optimizer must not see

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Keep gradients from the optimizer. It leaves parameters without one as they are, and their state, too."""
        for p in parameters:
            self.left_out[p] = p.grad
            p.grad = None

    def take_up_gradients(self) -> None:
        """Put back the gradients that were left out."""
        for p, gradient in self.left_out.items():
            p.grad = gradient
        self.left_out = {}
