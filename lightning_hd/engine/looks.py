"""Looks: in which steps the model is looked at, and when the numbers that it shows are read on the host."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.checks import check_fields, not_zero, save_fields
from lightning_hd.engine.decision import Look, Seen
from lightning_hd.engine.rates import Rates
from lightning_hd.hypergradient import View
from lightning_hd.optimizers import check_gradients, parameters_of
from lightning_hd.processes import Ranks, Sum

_OTHERS = 5
"""The numbers that are summed beside those of the view: three flags, the losses, and how many they are."""

_RARE = 3
"""Others have rewritten parameters if they had not written to any for so many steps before."""


@dataclass(eq=False)
class Losses:
    """The losses that have become known since the last look. No tensor is read on the host before it is used."""

    reported: list[Tensor | float] = field(default_factory=list)  # several are averaged
    returned: list[Tensor | float] = field(default_factory=list)  # by the last closure; it counts if none is reported
    passed: list[Tensor | float] = field(default_factory=list)  # of steps that were taken since the last look

    def pass_over(self) -> None:
        """Keep the losses of a step that was not looked at."""
        self.passed += self.reported or self.returned
        self.reported, self.returned = [], []

    def take(self, like: Tensor) -> Tensor:
        """Return the sum and the number of the losses, of shape (2,), in a tensor like another one; and forget them."""
        self.pass_over()
        losses, self.passed = self.passed, []
        found = [loss.to(like) if isinstance(loss, Tensor) else like.new_full((), loss) for loss in losses]
        return torch.stack([sum(found, start=like.new_zeros(())), like.new_full((), len(found))])


def check_loss(value: Any) -> Tensor | float:
    """A loss as a number or a copy, because the loss may be written to. Raise ``TypeError`` if it is none."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        return value.detach().clone().reshape(())
    if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"loss must be a real number or a tensor of one, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def versions(parameters: Sequence[Tensor]) -> list[int]:
    """How often each parameter was written to. torch has no public name for the counter that autograd keeps."""
    return list(map(operator.attrgetter("_version"), parameters))


@dataclass(frozen=True)
class Plan:
    """How looks go on after a step."""

    calm: int = 0  # the number of steps since the last event
    rested: int = 0  # the number of steps since the last look
    stride: int = not_zero(1)  # for how many steps the last look stands
    noted: bool = True  # whether the last step was noted, or looked at
    pending: Sum | None = None  # its numbers, if they are still to be read
    untouched: int = 0  # the number of steps since others wrote to the parameters


@dataclass(eq=False)
class Looks:
    """Decides whether a step is looked at, and when its numbers are read.

    As long as the rule wants to look at each step, the numbers of a step are read in it. That waits for the device.
    Later, looks are further apart. Then their numbers are read in the next step, when they have long been there. After
    an event, such as a back-off or a change of the groups, each step is looked at again.

    Where others rewrite parameters, as where dead units are initialized anew, the jump does not count as a move. The
    rules forget what the last steps have shown. Where parameters are clipped after every step, nothing is forgotten.

    All processes look at the same steps. So an event on one of them counts once all know of it.

    Args:
        optimizer: The optimizer.
        rates: The rates of its groups and scopes.
        view: The view of the model that the rule needs.
        ranks: The processes that train together.
    """

    optimizer: Optimizer
    rates: Rates
    view: View
    ranks: Ranks
    losses: Losses = field(default_factory=Losses)
    plan: Plan = Plan()
    _next: Plan = Plan()  # after the present step
    _event: bool = False  # whether there was an event on this process only
    _rewritten: bool = False  # whether others have rewritten parameters on this process
    _versions: list[int] | None = None  # how often each was written to when it ended, where that is known

    def __post_init__(self) -> None:
        self._parameters: Sequence[Tensor] = parameters_of(self.optimizer)  # those of the last step

    def look(self, step: int, parameters: Sequence[Tensor]) -> Look | None:
        """Look at the step of this number, read what was seen before, or do neither.

        Args:
            step: The number of the step.
            parameters: Those of the optimizer.

        Returns:
            What was seen; ``None`` if no process has a gradient, or a GradScaler makes the optimizer skip the step.
        """
        if all(p.grad is None for p in parameters) and (self.ranks.count == 1 or not parameters):
            return None
        # those that are new, or come to life, must not move at a rate that was found without them
        same = len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))
        joined = not same or self._wakes()
        self._parameters = parameters
        if joined:
            self.wake()
        untouched = self._see_writes(joined)
        seen = None if self.plan.pending is None else self._read(self.plan.pending.read())
        calm, rested = self.plan.calm, self.plan.rested + 1
        # looks may be as far apart as the rules of all scopes allow
        wanted = min([s.rule.stride(step - s.since, calm) if s.tuned else 1 for s in self.rates.scopes])
        if rested < wanted or not (self.plan.noted or joined):
            notes = rested + 1 >= wanted
            if notes:
                self.view.note(self._scopes(), parameters)
            self._next = Plan(calm + 1, rested, self.plan.stride, notes, untouched=untouched)
            return Look(False, seen, self.plan.stride)
        begun = self._begin()
        if wanted == 1:
            seen = self._read(begun.read())
            if seen is None:
                return None
        else:
            begun.fetch()
        self._next = Plan(calm + 1, 0, rested, True, None if wanted == 1 else begun, untouched)
        return Look(True, seen, rested)

    def _wakes(self) -> bool:
        """Whether a parameter needs a gradient now, or has its first one. Processes may differ in the second."""
        if any(p.requires_grad for p in self.view.asleep):
            return True
        return any(p.grad is not None for p in self.view.unused) and self.ranks.count == 1

    def _see_writes(self, joined: bool) -> int:
        """Notice parameters that were rewritten. Return the number of steps since others wrote to any.

        A write to ``p.data`` is not seen, because torch does not count it.
        """
        if joined or self._versions in (None, versions(self._parameters)):
            return self.plan.untouched + 1
        if self.plan.untouched >= _RARE:
            self.view.relocate()
            self.report()
            self._rewritten = True
        return 0

    def _scopes(self) -> list[int]:
        return [group.scope for group in self.rates.groups]

    def wake(self) -> None:
        """There was an event on all processes: look at each step again."""
        self.plan, self._next = replace(self.plan, calm=0), replace(self._next, calm=0)

    def report(self) -> None:
        """There was an event on this process, and perhaps on others."""
        if self.ranks.count == 1:
            self.wake()
        self._event = self.ranks.count > 1

    def finish(self) -> None:
        """The step was taken."""
        self.plan = self._next
        self.losses.pass_over()

    def leave(self) -> None:
        """A step has ended: from here on, others write to the parameters."""
        self._versions = versions(self._parameters)

    def pause(self) -> None:
        """Steps come that are not seen, so who writes to the parameters is not known."""
        self._versions = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_versions": None}  # torch does not copy them

    def _begin(self) -> Sum:
        """Begin to sum what the step shows over the processes, by one collective."""
        try:
            sums = self.view.observe(self._scopes(), self._parameters)
        except RuntimeError:
            check_gradients(self.optimizer)
            raise
        # A fused optimizer under a GradScaler unscales inside its step, and skips the step if it finds an inf. The
        # scaler reports it by this attribute, which exists during the step only.
        found_inf = getattr(self.optimizer, "found_inf", None)
        flags = sums.new_zeros(3)
        if found_inf is not None:
            flags[0] = found_inf.to(sums)
        if self._event:
            flags[1], self._event = 1.0, False
        if self._rewritten:
            flags[2], self._rewritten = 1.0, False
        return self.ranks.begin_sum(torch.cat([sums.flatten(), flags, self.losses.take(sums)]))

    def _read(self, sums: Sequence[float]) -> Seen | None:
        """What a look has shown; ``None``: nothing to learn from, as where a GradScaler has the step skipped."""
        *numbers, skipped, event, rewritten, loss, known = sums
        if event:
            self.wake()
        if rewritten:
            for scope in self.rates.scopes:
                scope.rule.begin("rewritten")
        width = self.view.width
        table = [] if skipped else [numbers[i : i + width] for i in range(0, len(numbers), width)]
        sights = self.view.sights(table)
        if len(sights) != len(self.rates.scopes) or not any(sight.has_gradient for sight in sights):
            return None
        return Seen(sights, loss / known if known and math.isfinite(loss) else None)

    # ------------------------------------------------------------------ what is saved

    def begin(self) -> None:
        """Begin a training: look at each step."""
        self.plan, self.losses = Plan(), Losses()

    def state_dict(self) -> dict[str, Any]:
        """How looks go on, and the numbers that are still to be read."""
        pending = self.plan.pending
        return {
            **save_fields(self.plan, without=("pending",)),
            "pending": [] if pending is None else list(pending.read()),
            **{name: list(map(float, losses)) for name, losses in vars(self.losses).items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. If that fails, everything stays as it was.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        losses = Losses(*([check_loss(loss) for loss in state_dict[name]] for name in vars(self.losses)))
        numbers = [float(number) for number in state_dict["pending"]]
        scopes, rest = divmod(len(numbers) - _OTHERS, self.view.width)
        if numbers and (rest or not 0 < scopes <= len(self.rates.scopes)):  # scopes may have been added since
            raise ValueError(f"pending must not be {len(numbers)} numbers")
        pending = Sum(torch.tensor(numbers, dtype=torch.float64)) if numbers else None
        self.pause()  # the parameters may be loaded, too
        self.plan = check_fields(Plan, state_dict, pending=pending)
        self.losses = losses
