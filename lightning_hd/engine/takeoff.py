"""First rates that a rule picks, and short trial steps of optimizers whose direction is not known."""

import math
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from lightning_hd.engine.lr import LARGEST, set_lr
from lightning_hd.engine.moment import Step
from lightning_hd.engine.rates import Rates
from lightning_hd.engine.scopes import Scope
from lightning_hd.engine.start import Start, shorten
from lightning_hd.hypergradient.directions import Measured, direction_of
from lightning_hd.rules import returned

_NORMS = "the norm of parameters, gradient or direction, without which no first step is taken,"


class TakeOff:
    """Finds the first rates of scopes whose rule picks them.

    Args:
        optimizer: The optimizer.
        rates: The rates of its groups and scopes.
        start: Measures the model before the first steps.
        long_horizon: Whether the rule does without the direction of the last step.
        stay: Called if a number is not finite, with the step, the scope, and the name of the number.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rates: Rates,
        start: Start,
        long_horizon: bool,
        stay: Callable[[Step, Scope, str], tuple[float, float]],
    ) -> None:
        self._optimizer = optimizer
        self._rates = rates
        self._start = start
        self._long_horizon = long_horizon
        self._stay = stay

    def prepare(self, step: Step) -> None:
        """Let rules pick first rates. If a direction must be measured first, prepare a short trial step."""
        groups = self._optimizer.param_groups
        weights: dict[int, dict[int, float]] = {}
        for i, (lr, weight) in enumerate(self._rates.effective(step.used, step.begun)):
            index = self._rates.groups[i].scope
            unknown = lr == 0 and not self._long_horizon and self._must_measure(i)
            if weight and step.has_gradient[index] and (unknown or self._rates.scopes[index].waits):
                weights.setdefault(index, {})[i] = weight
        if not weights:
            return
        for index, outlook in self._start.outlooks(weights, getattr(self._optimizer, "grad_scale", None)).items():
            scope = self._rates.scopes[index]
            if scope.waits and not outlook.is_finite:
                self._stay(step, scope, _NORMS)
            elif scope.waits and outlook.direction_norm and not outlook.is_zero:
                self._begin(step, index, outlook.param_norm, outlook.direction_norm)
                continue
            elif scope.waits and not outlook.is_zero:
                step.starting[index] = outlook.param_norm
            step.trial |= dict.fromkeys(weights[index], outlook.trial_lr(self._start.rounding(), scope.vanished))
        for i in step.trial:
            step.before |= {p: p.clone(memory_format=torch.preserve_format) for p in groups[i]["params"]}

    def _must_measure(self, group: int) -> bool:
        return isinstance(direction_of(self._optimizer, self._optimizer.param_groups[group], 0.0), Measured)

    def _begin(self, step: Step, index: int, param_norm: float, direction_norm: float) -> None:
        """Let the rule pick ``α_1`` of a scope."""
        rule = self._rates.scopes[index].rule
        lr = returned(rule.first_lr(param_norm, direction_norm), rule, "first_lr")
        if not math.isfinite(lr):
            raise ValueError(f"{type(rule).__name__}.first_lr must return a finite number, got {lr}")
        lr = self._rates.clamp(index, min(max(lr, -LARGEST), LARGEST))
        step.rates[index] = (lr, lr)
        step.begun.add(index)

    def measure(self, step: Step) -> None:
        """Let rules pick first rates from the directions that trial steps have shown."""
        groups = [
            {i: step.weights[i] for i in self._rates.members(index) if i in step.trial} for index in step.starting
        ]
        norms = self._start.measure(step.before, groups) if groups else []
        for (index, param_norm), own, norm in zip(step.starting.items(), groups, norms, strict=True):
            scope, d_norm = self._rates.scopes[index], norm / step.trial[next(iter(own))]
            if math.isfinite(d_norm) and d_norm:
                self._begin(step, index, param_norm, d_norm)
            elif d_norm:
                self._stay(step, scope, _NORMS)
            else:
                scope.vanished += 1

    def put_right(self, step: Step) -> None:
        """Shorten trial steps to the steps at the groups' own rates. Without a rate, the step is undone."""
        for i, (lr, weight) in enumerate(self._rates.effective(step.used, step.begun)):
            settings = self._optimizer.param_groups[i]
            if i in step.trial:
                part = lr / step.trial[i] if self._rates.groups[i].scope in step.begun else 0.0
                for p in settings["params"]:
                    shorten(p, step.before[p], part)
                step.lrs[i], step.weights[i] = set_lr(settings, lr), weight
