"""What is known of one step of an optimizer while it runs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_hd.hypergradient.view import Kept
from lightning_hd.rules import Observation


@dataclass
class Step:
    """One call of ``optimizer.step``, from when the gradients are ready until the parameters have moved."""

    rules: list[dict[str, Any]]  # the states of the rules before
    restore: list[float]  # what param_groups[i]["lr"] held before
    has_gradient: list[bool] = field(default_factory=list)  # of each scope, on any rank
    seen: list[Observation | None] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)  # α_t and γ_t of each scope
    kept: list[Kept | None] = field(default_factory=list)  # for each scope, of rules with a long horizon
    loss: float | None = None  # averaged over the ranks, where it is known
    finite: bool = True
    lrs: list[float] = field(default_factory=list)  # what param_groups[i]["lr"] holds during the update
    weights: list[float] = field(default_factory=list)  # derivative of the group's rate with respect to the scope's
    trial: dict[int, float] = field(default_factory=dict)  # rates of short trial steps, for groups of unknown direction
    starting: dict[int, float] = field(default_factory=dict)  # ‖θ_0‖ of scopes that get their first rate from a trial
    begun: set[int] = field(default_factory=set)  # scopes that get their first rate in this step
    before: dict[Tensor, Tensor] = field(default_factory=dict)  # θ_{t-1} of the groups on trial

    @property
    def used(self) -> list[float]:
        """``γ_t`` of each scope."""
        return [used for _, used in self.rates]
