"""What only the first steps need: agreement of the processes, dry steps, and measures for the first rate."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hd.engine.joins import check_joins
from lightning_hd.engine.lr import get_lr
from lightning_hd.engine.rates import Rates
from lightning_hd.hypergradient.directions import direction_of
from lightning_hd.hypergradient.products import squared_norm
from lightning_hd.optimizers import check_gradients, device_of, objective_gradient
from lightning_hd.processes import Ranks, as_real, exact_dtype, gradient_of, is_flat_shard, local, widen
from lightning_hd.rules import Rule

_TRIAL = 2.0**-13
"""The length of a trial step over the norm of the parameters. It is about that of a first step, so an optimizer may
keep the rate in its own state without harm. And it is long enough to be visible in float32."""

_PATIENCE = 3
"""After so many trial steps that left no trace, a longer one may be tried."""


@dataclass(frozen=True)
class Outlook:
    """What is known of a scope before its first step.

    Args:
        param_norm: ``‖θ_0‖``.
        grad_norm: ``‖g_1‖``.
        count: The number of coordinates.
        direction_norm: ``‖d_1‖``; ``None``: it is not known before the step.
        is_zero: Whether all gradients are zero.
    """

    param_norm: float
    grad_norm: float
    count: float
    direction_norm: float | None
    is_zero: bool

    @property
    def is_finite(self) -> bool:
        """Whether a first rate can be computed from these numbers."""
        return all(map(math.isfinite, (self.param_norm, self.grad_norm, self.direction_norm or 0.0)))

    def trial_lr(self, rounding: float, vanished: int) -> float:
        """A rate at which a step is short, whether its length follows the gradient's or not.

        The step vanishes in rounding if it follows a tiny gradient. Only then a longer one is tried after some steps
        without a trace. An optimizer may also leave no trace because it does not move in its first steps.

        Args:
            rounding: The relative rounding of the parameters.
            vanished: How many trial steps have left no trace.
        """
        length = max(_TRIAL, 4 * rounding) * (self.param_norm or 1.0)
        if not math.isfinite(length):
            return _TRIAL
        usual = math.sqrt(self.count or 1.0)
        norm = max(self.grad_norm, usual) if math.isfinite(self.grad_norm) else usual
        invisible = length * self.grad_norm / norm < rounding * (self.param_norm or 1.0)
        if vanished >= _PATIENCE and invisible and self.grad_norm:
            norm = self.grad_norm
        return min(length / norm, torch.finfo(torch.float32).max)


class Start:
    """The first steps of one optimizer.

    Args:
        optimizer: The optimizer.
        ranks: The processes that train together.
    """

    def __init__(self, optimizer: Optimizer, ranks: Ranks) -> None:
        self._optimizer = optimizer
        self._ranks = ranks

    def _parameters(self) -> list[Tensor]:
        return [p for settings in self._optimizer.param_groups for p in settings["params"]]

    def is_dry(self, fresh: bool) -> bool:
        """Whether this is the dry step by which ``torch.distributed.checkpoint`` makes an optimizer's state.

        In a dry step all rates and all gradients are 0. It comes before the first step, or while there is no state.
        One rank may take it alone, unless the parameters are sharded.

        Args:
            fresh: Whether no step was taken yet.
        """
        if not fresh and self._optimizer.state:
            return False
        parameters = self._parameters()
        shared = any(isinstance(p, DTensor) for p in parameters)
        try:
            live = any(map(get_lr, self._optimizer.param_groups))
        except (RuntimeError, TypeError, ValueError):  # a later check raises a clear error
            live = True
        if live and not (fresh and shared):
            return False
        gradients = [p.grad for p in parameters if p.grad is not None]
        live = live or (not gradients and any(p.requires_grad for p in parameters))
        live = live or any(g.layout != torch.strided or bool(local(g).any()) for g in gradients)
        if shared:
            live = bool(self._ranks.sum(self._zeros(1) + live).item())
        return not live

    def check(self, rates: Rates, rule: Rule, step_count: int) -> None:
        """Raise before the first step if something is wrong. All ranks raise if they do not tune the same."""
        error: Exception | None = None
        try:
            rates.check()
            self.check_gradients()
        except (TypeError, ValueError) as wrong:
            error = wrong
        if self._ranks.count > 1:
            check_joins(self._parameters())
            groups = self._optimizer.param_groups
            own = {
                "error": error and repr(error),
                "optimizer": type(self._optimizer).__name__,
                "rule": (type(rule).__name__, vars(rule)),
                "scope": rates.kind,
                "min_lr, max_lr": rates.limits,
                "step_count": step_count,
                "lrs": [str(settings["lr"]) if error else get_lr(settings) for settings in groups],
                "shapes of parameters": [
                    ["a flat shard" if is_flat_shard(p) else tuple(p.shape) for p in settings["params"]]
                    for settings in groups
                ],
                "what was learned": rates.state_dict()["scopes"],
            }
            self._compare(_plain(own))
        if error is not None:
            raise error

    def check_gradients(self) -> None:
        """Raise ``TypeError`` if a gradient is sparse."""
        check_gradients(self._parameters())

    def _compare(self, own: Mapping[str, Any]) -> None:
        for rank, other in enumerate(everyone := self._ranks.gather(own)):
            for key, value in other.items():
                if value != everyone[0][key]:
                    raise RuntimeError(
                        f"HypergradientLR({own['optimizer']}): the processes do not tune the same: {key} is "
                        f"{everyone[0][key]} on rank 0 and {value} on rank {rank}. Give models that train apart a "
                        "process_group each"
                    )

    def outlooks(self, scopes: Mapping[int, Mapping[int, float]], grad_scale: Tensor | None) -> dict[int, Outlook]:
        """What is known of some scopes before their first steps. It takes one collective.

        Args:
            scopes: For each scope its groups, with the derivative of the group's rate with respect to the scope's.
            grad_scale: The factor that a GradScaler has left in the gradients, or ``None``.
        """
        sums = self._ranks.sum(torch.stack([self._outlook(groups, grad_scale) for groups in scopes.values()]))
        return {
            index: Outlook(math.sqrt(p), math.sqrt(g), count, None if unknown else math.sqrt(d), not nonzero)
            for index, (p, g, count, d, unknown, nonzero) in zip(scopes, sums.tolist(), strict=True)
        }

    def _outlook(self, groups: Mapping[int, float], grad_scale: Tensor | None) -> Tensor:
        sums = self._zeros(6)
        for i, weight in groups.items():
            settings = self._optimizer.param_groups[i]
            direction = direction_of(self._optimizer, settings, 0.0)
            for p in settings["params"]:
                if p.grad is None or not weight:
                    continue
                theta, raw = widen(as_real(local(p.detach()))), widen(as_real(local(gradient_of(p))))
                g = objective_gradient(self._optimizer, settings, raw, theta.detach, grad_scale)
                d = direction.ahead(g, theta, partial(self._state, p))
                d_squared = 0.0 if d is None else weight**2 * float(squared_norm(d))
                numbers = [float(squared_norm(theta)), float(squared_norm(g)), theta.numel(), d_squared]
                sums += sums.new_tensor([*numbers, d is None, bool(raw.any())]) / self._ranks.copies(p)
        return sums

    def _state(self, p: Tensor, name: str) -> Tensor | None:
        tensor = self._optimizer.state.get(p, {}).get(name)
        return None if tensor is None else widen(as_real(local(tensor)))

    def measure(self, before: Mapping[Tensor, Tensor], groups: Sequence[Mapping[int, float]]) -> list[float]:
        """``‖θ_0 - θ_1‖`` for some scopes, where each group has its weight. It takes one collective."""
        sums = self._zeros(len(groups))
        for s, own in enumerate(groups):
            for i, weight in own.items():
                for p in self._optimizer.param_groups[i]["params"]:
                    if p in before:
                        move = widen(as_real(local(before[p]))) - widen(as_real(local(p.detach())))
                        sums[s] += (weight**2 * squared_norm(move)).to(sums.device) / self._ranks.copies(p)
        return [math.sqrt(square) for square in self._ranks.sum(sums).tolist()]

    def rounding(self) -> float:
        """The relative rounding of the narrowest parameters."""
        dtypes = {p.dtype for p in self._parameters() if p.is_floating_point() or p.is_complex()}
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def _zeros(self, size: int) -> Tensor:
        device = device_of(self._optimizer)
        return torch.zeros(size, dtype=exact_dtype(device), device=device)


def shorten(p: Tensor, before: Tensor, part: float) -> None:
    """Shorten the move of a parameter to a part of it; a part of 0 restores the parameter."""
    if part:
        p_real, start = as_real(p), widen(as_real(before))
        p_real.copy_(start + (widen(p_real) - start) * part)
    else:
        p.copy_(before)


def _plain(value: Any) -> Any:
    """A value that can be compared between processes: tensors as numbers, functions as names, objects as classes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if inspect.isfunction(value):
        return value.__qualname__
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__
