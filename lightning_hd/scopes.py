"""What is known of one learned rate, and of the groups that follow it."""

from dataclasses import dataclass

from lightning_hd.rules import Observation, Rule


@dataclass
class Scope:
    """One learned learning rate: of the whole optimizer, or of one parameter group."""

    rule: Rule
    lr: float = 0.0  # α_t
    used: float = 0.0  # γ_t, the rate of the last step: α_t itself but for rules with a transition
    reference: float = 1.0  # what α would be without learning
    from_zero: bool = False  # configured at 0: there is no ratio to keep, the groups count as equal, the reference is 1
    started: bool = False  # whether a step has been taken at a rate of its own
    moved: bool = False  # whether the last step was one, and not at a rate of 0
    vanished: int = 0  # how many steps on trial have left no trace
    last: Observation | None = None

    @property
    def waits(self) -> bool:
        """Whether the rule has yet to pick the first rate."""
        return self.rule.picks_start and not self.started

    @property
    def scale(self) -> float:
        """The learned scale."""
        return self.used / self.reference


@dataclass
class Group:
    """The rate of one parameter group."""

    scope: int
    lr: float  # effective learning rate of the last step
    base: float = 0.0  # what the configuration, or the scheduler, gives the group
    join: float = 1.0  # for a group added in mid-training: what makes it join at its configured rate
    zero: bool = False  # configured at 0, so that no clamp shall move it

    @property
    def unscaled(self) -> float:
        """The group's rate at a scale of 1."""
        return self.base * self.join
