"""First rates that a rule picks, and short trial steps of optimizers whose direction is not known."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_hd.engine.decision import Decision, Step
from lightning_hd.engine.linearity import dependence
from lightning_hd.engine.rates import Rates, number, waits
from lightning_hd.hypergradient import Measured, direction_of, squared_norm
from lightning_hd.optimizers import LARGEST, device_of, rounding_of, set_lr, to_objective
from lightning_hd.processes import Ranks, as_real, exact_dtype, gradient_of, local, widen

_TRIAL = 2.0**-13
"""The length of a trial step over the norm of the parameters. It is about that of a first step, so an optimizer may
keep the rate in its own state without harm. And it is long enough to be visible in float32."""

_PATIENCE = 3
"""After so many trial steps that left no trace, a longer one may be tried where the gradient is tiny."""

_PROJECTED = 0.5
"""If less of a trial step than this depends on its rate, only this part is the direction."""

_SHORT = 2.0**-6
"""A trial step is too short to be measured below this part of the length that it should have."""

_LEFT_OUT = (
    "the norm of parameters, gradient or direction is not a finite number, so there is no first learning rate yet. The "
    "parameters stay as they are"
)

Weights = Mapping[int, float]
"""For each group of a scope, the derivative of the group's rate with respect to the scope's."""


class Outlook(NamedTuple):
    """What is known of a scope before its first step: sums over its coordinates, and two counts of parameters."""

    param_squared: float  # ‖θ_0‖²
    grad_squared: float  # ‖g_1‖²
    size: float  # the number of coordinates
    direction_squared: float  # ‖d_1‖²
    unknown: float  # where the direction is not known before the step
    nonzero: float  # where the gradient is not zero

    @property
    def is_finite(self) -> bool:
        """Whether a first rate can be computed from these numbers."""
        return all(map(math.isfinite, (self.param_squared, self.grad_squared, self.direction_squared)))

    @property
    def param_norm(self) -> float:
        """``‖θ_0‖``."""
        return math.sqrt(self.param_squared)

    @property
    def direction_norm(self) -> float:
        """``‖d_1‖``; 0 if it is not known before the step."""
        return 0.0 if self.unknown else math.sqrt(self.direction_squared)

    def length(self, rounding: float) -> float:
        """The length of a trial step, where the parameters have this relative rounding."""
        return max(_TRIAL, 4 * rounding) * (self.param_norm or 1.0)

    def trial_lr(self, rounding: float, vanished: int) -> float:
        """A rate at which a step is short, whether its length follows the gradient's or not.

        The step vanishes in rounding if it does not follow a large gradient, or if it follows a tiny one. Only then a
        longer one is tried, in the second case after some steps without a trace: an optimizer may also leave none
        because it does not move in its first steps.

        Args:
            rounding: The relative rounding of the parameters.
            vanished: How many trial steps have left no trace.
        """
        length = self.length(rounding)
        if not math.isfinite(length):
            return _TRIAL
        grad_norm, usual = math.sqrt(self.grad_squared), math.sqrt(self.size or 1.0)
        norm = max(grad_norm, usual) if math.isfinite(grad_norm) else usual
        invisible = length * grad_norm / norm < rounding * (self.param_norm or 1.0)
        if grad_norm and vanished >= (_PATIENCE if invisible else 1):
            norm = grad_norm if invisible else usual
        return min(length / norm, LARGEST)

    def is_too_short(self, move_norm: float, lr: float, rounding: float) -> bool:
        """Whether a longer trial step would be better than one at this rate, because the move is lost in rounding."""
        length = self.length(rounding)
        return move_norm < _SHORT * length and lr < length / math.sqrt(self.size or 1.0)


@dataclass(eq=False)
class FirstRates:
    """Finds the first rates of scopes whose rule picks them.

    Args:
        optimizer: The optimizer.
        rates: The rates of its groups and scopes.
        ranks: The processes that train together.
        long_horizon: Whether the rule does without the direction of the last step.
    """

    optimizer: Optimizer
    rates: Rates
    ranks: Ranks
    long_horizon: bool

    # ------------------------------------------------------------------ before the update

    def prepare(self, step: Step) -> None:
        """Let rules pick first rates. If a direction must be measured first, prepare a short trial step."""
        weights = self._unknown(step)
        if not weights:
            return
        rounding = rounding_of(self.optimizer)
        sums = self.ranks.sum(torch.stack([self._look(own) for own in weights.values()]))  # by one collective
        for index, outlook in zip(weights, map(Outlook._make, sums.tolist()), strict=True):
            scope = self.rates.scopes[index]
            if waits(scope) and not outlook.is_finite:
                self.rates.stay(step, _LEFT_OUT)
                step.leave_out(p for i in weights[index] for p in self.optimizer.param_groups[i]["params"])
                continue
            if waits(scope) and outlook.nonzero:
                if outlook.direction_norm:
                    self._pick(step, index, outlook.param_norm, outlook.direction_norm)
                    continue
                step.awaiting[index] = outlook
            step.trial |= dict.fromkeys(weights[index], outlook.trial_lr(rounding, scope.vanished))
        if step.awaiting:
            step.dependence = dependence(self.optimizer, step.trial, self.ranks)
        for i in step.trial:
            step.before |= {p: p.clone(memory_format=torch.preserve_format) for p in self._parameters(i)}

    def _unknown(self, step: Step) -> dict[int, dict[int, float]]:
        """Scopes that wait for a first rate, or for a direction at a rate of 0, with the weights of their groups."""
        found: dict[int, dict[int, float]] = {}
        used = [decision.used for decision in step.decisions]
        for i, (lr, weight) in enumerate(self.rates.effective(used, step.picked)):
            index = self.rates.groups[i].scope
            if weight and step.sights[index].has_gradient:
                directionless = lr == 0 and not self.long_horizon and self._is_measured(i)
                if directionless or waits(self.rates.scopes[index]):
                    found.setdefault(index, {})[i] = weight
        return found

    def _is_measured(self, group: int) -> bool:
        return isinstance(direction_of(self.optimizer, self.optimizer.param_groups[group], 0.0), Measured)

    def _pick(self, step: Step, index: int, param_norm: float, direction_norm: float) -> None:
        """Let the rule pick ``α_1`` of a scope."""
        rule = self.rates.scopes[index].rule
        lr = number(rule.first_lr(param_norm, direction_norm), rule, "first_lr")
        if not math.isfinite(lr):
            raise ValueError(f"{type(rule).__name__}.first_lr must return a finite number, got {lr}")
        lr = self.rates.clamp(index, min(max(lr, -LARGEST), LARGEST))
        step.decisions[index] = Decision(lr, lr)
        step.picked.add(index)

    def _look(self, weights: Weights) -> Tensor:
        """The numbers of an ``Outlook`` for one scope, on this process."""
        sums = self._zeros(len(Outlook._fields))
        for i, weight in weights.items():
            group = self.optimizer.param_groups[i]
            direction = direction_of(self.optimizer, group, 0.0)
            for p in group["params"]:
                if p.grad is not None:
                    theta, g = widen(as_real(local(p.detach()))), widen(as_real(local(gradient_of(p)))).clone()
                    nonzero = bool(g.any())
                    to_objective(self.optimizer, group, [g], [theta])
                    d = direction.ahead(g, theta, partial(self._state, p))
                    theta2, g2, d2 = (0.0 if x is None else float(squared_norm(x)) for x in (theta, g, d))
                    row = Outlook(theta2, g2, theta.numel(), weight**2 * d2, d is None, nonzero)
                    sums += sums.new_tensor(row) / self.ranks.replicas(p)
        return sums

    def _state(self, p: Tensor, name: str) -> Tensor | None:
        tensor = self.optimizer.state.get(p, {}).get(name)
        return None if tensor is None else widen(as_real(local(tensor)))

    # ------------------------------------------------------------------ after the update

    def measure(self, step: Step) -> None:
        """Let rules pick first rates from the directions that trial steps have shown."""
        if not step.awaiting:
            return
        trials = {
            index: {i: step.weights[i] for i in self.rates.members(index) if i in step.trial} for index in step.awaiting
        }
        for (index, weights), norm in zip(trials.items(), self._move_norms(step, trials.values()), strict=True):
            lr, outlook, scope = step.trial[next(iter(weights))], step.awaiting[index], self.rates.scopes[index]
            if not math.isfinite(norm / lr):
                self.rates.stay(step, _LEFT_OUT)
            elif not norm or outlook.is_too_short(norm, lr, rounding_of(self.optimizer)):
                scope.vanished += 1
            else:
                # a projection that is a part of every step does not depend on the rate
                own = step.dependence if step.dependence < _PROJECTED else 1.0
                self._pick(step, index, outlook.param_norm, own * norm / lr)

    def _move_norms(self, step: Step, scopes: Iterable[Weights]) -> list[float]:
        """``‖θ_0 - θ_1‖`` of some scopes. It takes one collective."""
        sums = []
        for weights in scopes:
            total = self._zeros(1)
            for i, weight in weights.items():
                for p in self._parameters(i):
                    move = widen(as_real(local(step.before[p]))) - widen(as_real(local(p.detach())))
                    total += (weight**2 * squared_norm(move)).to(total.device) / self.ranks.replicas(p)
            sums.append(total)
        return [math.sqrt(square) for square in self.ranks.sum(torch.cat(sums)).tolist()]

    def put_right(self, step: Step) -> None:
        """Shorten trial steps to the steps at the groups' own rates. Without a rate, the step is undone."""
        used = [decision.used for decision in step.decisions]
        for i, (lr, weight) in enumerate(self.rates.effective(used, step.picked)):
            if i in step.trial:
                group = self.optimizer.param_groups[i]
                part = lr / step.trial[i] if self.rates.groups[i].scope in step.picked else 0.0
                for p in self._parameters(i):
                    _shorten(p, step.before[p], part)
                step.lrs[i], step.weights[i] = set_lr(group, lr), weight

    def _parameters(self, group: int) -> list[Tensor]:
        """The parameters of a group, without those of lazy modules that were not called yet."""
        return [p for p in self.optimizer.param_groups[group]["params"] if not is_lazy(p)]

    def _zeros(self, size: int) -> Tensor:
        device = device_of(self.optimizer)
        return torch.zeros(size, dtype=exact_dtype(device), device=device)


def _shorten(p: Tensor, before: Tensor, part: float) -> None:
    """Shorten the move of a parameter to a part of it; a part of 0 restores the parameter."""
    if part:
        p_real, origin = as_real(p), widen(as_real(before))
        p_real.copy_(origin + (widen(p_real) - origin) * part)
    else:
        p.copy_(before)
