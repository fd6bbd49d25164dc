"""Tests whether an optimizer's step is proportional to its learning rate, by replaying a step on a copy."""

import contextlib
import copy
import inspect
import math
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import get_total_norm
from torch.optim import Adafactor, Optimizer

from lightning_hd.optimizers import device_of, inner_optimizers, like, parameters_of, torch_class
from lightning_hd.processes import Notices, Ranks, as_real, local

_LARGEST = 2**20
"""About how many coordinates the copy has. It is made of the smallest parameters."""

_PART = 0.05
"""Moves count as proportional if the residual is at most this part of them. Rounding has an allowance of its own."""

_GROWTH = 3.5
"""Where the rate multiplies a sum of former steps, the moves at a rate and at twice the rate differ by more than this
many times the first move. They differ by 1 where the step is linear, by 2 where the rate is in an average, and by 3
where the step is quadratic in the rate."""

_ADVICE = {
    True: "the rate changes by 2 % per step at most, because a change of it also changes what former steps have done",
    False: "the hypergradient with respect to its last rate is wrong. Use rule='auto'",
}
"""The consequence, and what the user can do, for rules with a long horizon (``True``) and for others."""

_DEPTH = 4
"""How deep the attributes of an optimizer may be nested for it to be copied."""

_DUE = (2, 5, 9)
"""The numbers of steps after which one is replayed. The first ones show no difference if the rate is in sums of old
steps."""

_PATIENCE = 20
"""After so many steps, an optimizer that has not moved yet is not tested any more."""


class Linearity:
    """Tests early steps of optimizers that are not torch's own.

    Args:
        optimizer: The optimizer.
        ranks: The processes that train together.
        notices: Where warnings go.
        long_horizon: Whether the rule looks at the moves of many steps.

    Attributes:
        due: The numbers of steps after which one is still to be tested.
        failed: Whether a step was found not to be linear in the rate. For a rule that looks at the moves of many steps,
            it fails only if a change of the rate also changes what former steps have done. The parameters then move by
            more than the step itself.
    """

    def __init__(self, optimizer: Optimizer, ranks: Ranks, notices: Notices, long_horizon: bool) -> None:
        self._optimizer = optimizer
        self._ranks = ranks
        self._notices = notices
        self._long_horizon = long_horizon
        known = torch_class(type(optimizer))
        if known is None and any("d" in group for group in optimizer.param_groups):  # torch's Adafactor has a d, too
            notices.warn(
                "own estimate",
                "this optimizer estimates its learning rate itself, as Prodigy and D-Adaptation do. Two estimates on "
                "top of each other fail. Use it alone, or tune a plain optimizer",
            )
        self.due = list(_DUE) if known is None or known is Adafactor else []
        self.failed = False

    def test(self, step_count: int, lrs: Sequence[float]) -> None:
        """Test the next step. Call it when the gradients are ready.

        Args:
            step_count: The number of steps so far.
            lrs: The rate of each group in the last one.
        """
        if step_count > _PATIENCE:
            self.due = []
            return
        rates = {i: lr for i, lr in enumerate(lrs) if lr}
        votes = self._votes(_replay(self._optimizer, rates)) if rates else (False, False, False)
        counts = torch.tensor(votes, dtype=torch.float32, device=device_of(self._optimizer))
        moved, ignoring, failed = self._ranks.sum(counts).tolist()  # how many processes vote for each
        if not moved:
            self.due[0] = step_count + 1
        elif ignoring == moved:
            self.due = []
            self._notices.warn(
                "rate not used",
                "its steps do not depend on the lr of its parameter groups, so the rate that is reported is not used. "
                + inner_optimizers(self._optimizer),
            )
        elif failed:
            self.due, self.failed = [], True
            advice = _ADVICE[self._long_horizon]
            self._notices.warn("not linear", f"its step is not linear in its learning rate, so {advice}")
        else:
            del self.due[0]

    def _votes(self, moves: "_Moves | None") -> tuple[bool, bool, bool]:
        """Whether two moves show anything, whether they are the same, and whether they fail to be proportional."""
        if moves is None or moves.second <= 2 * moves.rounding / _PART:
            return False, False, False
        growth = moves.growth / max(moves.first, moves.rounding)
        left = max(moves.left - 4 * moves.rounding, 0.0) / moves.second
        return True, moves.are_same, growth > _GROWTH if self._long_horizon else left > _PART


def dependence(optimizer: Optimizer, rates: dict[int, float], ranks: Ranks) -> float:
    """How much of a move depends on the rates: the move at twice the rates minus that at these, over that at these.

    It is 1 where moves are proportional to the rates, or are not known. It is less where a part of every step does not
    depend on them, as a projection of the weights.
    """
    if torch_class(type(optimizer)) is not None:
        return 1.0
    moves, squares = _replay(optimizer, rates), [0.0, 0.0]
    if moves is not None and not moves.are_same:
        squares = [moves.growth**2, moves.first**2]
    growth, first = ranks.sum(torch.tensor(squares, dtype=torch.float32, device=device_of(optimizer))).tolist()
    return min(1.0, math.sqrt(growth / first)) if first else 1.0


class _Moves(NamedTuple):
    """The norms of two moves of a copy, at some rates and at twice these."""

    first: float
    second: float
    left: float  # of what is left of the second without twice the first
    growth: float  # of their difference
    rounding: float  # of the parameters

    @property
    def are_same(self) -> bool:
        """Whether they do not differ, but for rounding."""
        return self.growth <= 2 * self.rounding


def _replay(optimizer: Optimizer, rates: dict[int, float]) -> _Moves | None:
    """Compare two moves of a copy; ``None`` if the optimizer cannot be copied, or they are not finite."""
    parameters = [p for i in rates for p in optimizer.param_groups[i]["params"] if p.grad is not None]
    chosen = _smallest(parameters)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    states = [dict(optimizer.state[p]) for p in chosen if p in optimizer.state]
    if not _is_plain([_attributes(optimizer), groups, states]):
        return None
    try:
        once = _moves(optimizer, rates, chosen)
        twice = _moves(optimizer, {i: 2 * lr for i, lr in rates.items()}, chosen)
    except Exception:  # such an optimizer may need what the copy does not have
        return None
    rounding = _norm([torch.finfo(p.dtype).eps * as_real(local(p.detach())).double() for p in chosen])
    left = _norm([b - 2 * a for a, b in zip(once, twice, strict=True)])
    growth = _norm([b - a for a, b in zip(once, twice, strict=True)])
    return _Moves(_norm(once), _norm(twice), left, growth, rounding) if math.isfinite(left) else None


def _smallest(parameters: list[Tensor]) -> list[Tensor]:
    ordered = sorted(parameters, key=Tensor.numel)
    sums = accumulate(map(Tensor.numel, ordered))
    return [p for p, size in zip(ordered, sums, strict=True) if size <= _LARGEST] or ordered[:1]


def _moves(optimizer: Optimizer, rates: dict[int, float], chosen: list[Tensor]) -> list[Tensor]:
    """The moves of some parameters in a step at these rates, in float64. A copy of the optimizer takes the step."""
    twins = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in chosen]
    for twin, p in zip(twins, chosen, strict=True):
        twin.grad = None if p.grad is None else p.grad.detach().clone()
    copied = _copy(optimizer, rates, dict(zip(map(id, chosen), twins, strict=True)))
    with _kept_random_state(chosen), torch.no_grad():
        # without torch's wrapper of the step, which calls hooks that are registered for all optimizers
        inspect.unwrap(type(optimizer).step, stop=lambda step: not getattr(step, "hooked", False))(copied)
    return [
        as_real(local(twin.detach())).double() - as_real(local(p.detach())).double()
        for twin, p in zip(twins, chosen, strict=True)
    ]


def _copy(optimizer: Optimizer, rates: dict[int, float], twins: dict[int, nn.Parameter]) -> Optimizer:
    """A copy of an optimizer for a few of its parameters.

    Args:
        optimizer: The optimizer.
        rates: The rates that some of its groups get.
        twins: The copies of some parameters, by the ids of the originals. The others are left out.
    """
    memo: dict[int, Any] = {  # what the copy has in place of an original, by the id of that
        id(p): twins[id(p)] if id(p) in twins else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in parameters_of(optimizer)
        if not is_lazy(p)
    }
    groups = copy.deepcopy(optimizer.param_groups, memo)  # into the memo, for an inner optimizer may share the groups
    for group, original in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = [twins[id(p)] for p in original["params"] if id(p) in twins]
    for i, lr in rates.items():
        groups[i]["lr"] = like(groups[i]["lr"], lr)
    state = {memo[id(p)]: copy.deepcopy(dict(s), memo) for p, s in optimizer.state.items() if id(p) in twins}
    twin: Optimizer = type(optimizer).__new__(type(optimizer))
    vars(twin).update(copy.deepcopy(_attributes(optimizer), memo))
    twin.__setstate__({"param_groups": groups, "state": type(optimizer.state)(dict, state)})
    return twin


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of the optimizer beside its groups, its state and its hooks."""
    without = ("param_groups", "state", "step")
    return {name: value for name, value in vars(optimizer).items() if name not in without and "_hooks" not in name}


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a deep copy of a value is independent of it.

    It is if the value holds only numbers, small tensors, and optimizers of such. A function or a weak reference in a
    copy is that of the original, so it may change the original.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return True
    if isinstance(value, Tensor):
        return isinstance(value, nn.Parameter) or value.numel() <= _LARGEST
    if depth > _DEPTH:
        return False
    if isinstance(value, Optimizer):
        size = sum(p.numel() for p in parameters_of(value))
        return size <= 2 * _LARGEST and _is_plain(_attributes(value), depth + 1)
    if isinstance(value, dict):
        return all(_is_plain(item, depth + 1) for pair in value.items() for item in pair)
    return isinstance(value, (list, tuple, set)) and all(_is_plain(item, depth + 1) for item in value)


@contextlib.contextmanager
def _kept_random_state(parameters: list[Tensor]) -> Iterator[None]:
    """Leave the generators of torch, NumPy and Python as they were."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])


def _norm(tensors: list[Tensor]) -> float:
    return float(get_total_norm(tensors))
