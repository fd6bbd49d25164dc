"""LastStep, the view of the paper's rules: it compares the new gradient with the direction of the last step."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_fields, check_flag
from lightning_hd.hypergradient.buckets import Bucket, are_safe, flatten, gather, pack
from lightning_hd.hypergradient.copies import copies_of
from lightning_hd.hypergradient.directions import COPY, PARAMETER, Direction, Gradient, Measured, direction_of
from lightning_hd.hypergradient.probe import look
from lightning_hd.hypergradient.view import Retained, Sight, View
from lightning_hd.optimizers import changes_gradients, coupled_decay, device_of, to_objective
from lightning_hd.processes import Notices, Ranks, exact_dtype, gradient_of, local, widen
from lightning_hd.rules import Observation

_GRADIENT = "gradient"

_ALONE = 2**15
"""Tensors of so many coordinates are multiplied where they are on a CPU. To copy a smaller one is cheaper than the
operations that it would need."""

_CACHED = 2**19
"""The largest number of coordinates in a bucket on a CPU. Directions take some ten vectors of that size, 2 MiB each. At
2^17 there are four times as many operations, and a step takes 1.2 times as long."""


class _LostError(Exception):
    """The optimizer's state lacks a tensor that it had when the parameters were laid out."""


class _Sums(NamedTuple):
    """The numbers of one scope: two flags, and three sums over the coordinates."""

    has_gradient: float
    known: float
    derivative: float  # -g·d
    g_squared: float
    d_squared: float


_WIDTH = len(_Sums._fields) - 2


@dataclass
class Last:
    """The last step of one parameter group."""

    weight: float = 0.0  # derivative of the group's rate with respect to the scope's
    direction: Direction = field(default_factory=Gradient)  # of no parameter, before a first step
    moved: list[Tensor] = field(default_factory=list)  # the parameters that were updated, while d is known


class LastStep(View):
    """The derivative of the loss with respect to the last rate, ``h_t = -g_t · d_{t-1}`` (Section 3 of the paper).

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.
    """

    width = len(_Sums._fields)

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        super().__init__(optimizer, budget, ranks, notices)
        self._copies = copies_of(optimizer)
        self._last = [Last() for _ in optimizer.param_groups]  # of each group
        self._next: list[Last] = []  # filled during a step
        self._loads = self._copies.loads
        self._layout: Any = None  # what the buckets are made for
        self._age = 0  # the number of steps since the buckets were made
        self._buckets: list[Bucket] = []
        self._flags: list[tuple[bool, bool]] = []  # of each scope: whether there is a gradient, and a known direction
        self._measured: set[int] = set()  # scopes whose last step was measured, and moved them

    # ------------------------------------------------------------------ before a step

    def observe(self, scopes: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
        """The numbers of ``_Sums`` for each scope; see ``View.observe``."""
        self._last += [Last() for _ in self._optimizer.param_groups[len(self._last) :]]
        if self._loads != self._copies.loads:
            self._loads, self._layout = self._copies.loads, None
        try:
            return self._sum(scopes)
        except _LostError:
            self._layout = None
            return self._sum(scopes)

    def _sum(self, scopes: Sequence[int]) -> Tensor:
        self._lay_out(scopes)
        self._measured = {
            scopes[i]
            for i, last in enumerate(self._last)
            if isinstance(last.direction, Measured) and last.direction.lr * last.weight
        }
        flats: dict[tuple[str, int], Tensor] = {}
        rows, factors = [], []
        for bucket in self._buckets:
            group, steps = bucket.key
            last, get = self._last[group], partial(self._quantity, bucket, flats)
            d, factor = None, 1.0
            if steps is not None:
                taken = steps + self._age
                d, factor = last.direction.read(get, taken), last.direction.factor(taken)
            rows.append(products(self._gradient(bucket, get), d, bucket.weights, self._wide, factor))
            share = 1 / bucket.replicas
            factors.append((scopes[group], -last.weight * share, share, last.weight**2 * share))
        return self._sums.by_scope(rows, factors, self._flags, device_of(self._optimizer), _WIDTH)

    def _quantity(self, bucket: Bucket, flats: dict[tuple[str, int], Tensor], name: str) -> Tensor:
        """A quantity of a bucket by its name. ``flats`` has those of parameters that are in several buckets."""
        places = [place for place in bucket.parts if (name, place) not in flats]
        slots = [self.slots[place] for place in places]
        found = flatten(slots, [self._get(name, slot.p) for slot in slots])
        flats |= {(name, place): flat for place, flat in zip(places, found, strict=True)}
        return widen(gather(bucket.views({place: flats[name, place] for place in bucket.parts})))

    def _get(self, name: str, p: Tensor) -> Tensor:
        """The tensor of this name for a parameter: one of its own, the copy, or one of the optimizer's state."""
        if name == _GRADIENT:
            return gradient_of(p)
        if name == PARAMETER:
            return p.detach()
        found = self._copies.tensors.get(p) if name == COPY else self._optimizer.state.get(p, {}).get(name)
        if found is None:
            raise _LostError
        return found

    def _gradient(self, bucket: Bucket, get: Callable[[str], Tensor]) -> Tensor:
        """``g_t`` of a bucket."""
        group, _ = bucket.key
        param_group = self._optimizer.param_groups[group]
        g = get(_GRADIENT)
        if not changes_gradients(self._optimizer, param_group):
            return g
        g = g.to(exact_dtype(bucket.device) if self._wide else g.dtype, copy=True)
        decays = coupled_decay(self._optimizer, param_group) != 0
        to_objective(self._optimizer, param_group, [g], [get(PARAMETER)] if decays else [])
        return g

    def sights(self, sums: Sequence[Sequence[float]]) -> list[Sight]:
        """What the step shows of each scope."""
        found, squares = [], list[float]()
        for scope, row in enumerate(map(_Sums._make, sums)):
            observation = Observation(row.derivative, math.sqrt(row.g_squared), math.sqrt(row.d_squared))
            vanished = scope in self._measured and row.d_squared == 0 < row.g_squared
            found.append(Sight(row.has_gradient > 0, row.known > 0, observation, vanished=vanished))
            squares += [row.g_squared, row.d_squared] if row.known else [row.g_squared]
        self._wide = not are_safe(squares) if squares else self._wide
        return found

    def _lay_out(self, scopes: Sequence[int]) -> None:
        """Lay out the parameters that have a gradient, unless the last layout still holds."""
        alike, groups = self._alike(scopes), self._optimizer.param_groups
        places = ((i, j, p) for i, group in enumerate(groups) for j, p in enumerate(group["params"]))
        seen = [(i, j, p) for i, j, p in places if p.grad is not None]
        moved = [set(map(id, last.moved)) for last in self._last]
        layout = alike, [(i, j, id(p), p.numel()) for i, j, p in seen], moved
        if layout == self._layout:
            return
        had = [(i, p) for i, _, p in seen if id(p) in moved[i]]
        steps = {id(p): self._steps_of(self._last[i], p) for i, p in had if self._is_there(self._last[i], p)}
        self._choose(look(seen, self.budget, self._ranks, {}))
        self._buckets = pack(self.slots, lambda slot: (alike[slot.group], steps.get(id(slot.p))), _CACHED, _ALONE)
        with_gradient = {scopes[i] for i, _, _ in seen}
        with_direction = {scopes[i] for i, _, p in seen if id(p) in steps}
        self._flags = [(scope in with_gradient, scope in with_direction) for scope in range(max(scopes) + 1)]
        self._layout, self._age = layout if len(steps) == len(had) else None, 0

    def _alike(self, scopes: Sequence[int]) -> list[int]:
        """For each group, the first group whose directions and gradients are computed with the same numbers."""
        first: dict[Any, int] = {}
        numbers = [
            (scope, last.weight, last.direction, group.get("maximize", False), coupled_decay(self._optimizer, group))
            for scope, group, last in zip(scopes, self._optimizer.param_groups, self._last, strict=True)
        ]
        return [first.setdefault(own, i) for i, own in enumerate(numbers)]

    def _is_there(self, last: Last, p: Tensor) -> bool:
        """Whether all tensors are there from which the direction of a parameter is computed; warns otherwise."""
        with suppress(_LostError):
            if all(self._get(name, p).shape == p.shape for name in last.direction.needs):
                return True
        self._notices.warn(
            "lost direction",
            "the optimizer's state has lost the last direction, so the learning rate stays as it is for one step. Was "
            "the state loaded from a checkpoint that was written without tuning?",
        )
        return False

    def _steps_of(self, last: Last, p: Tensor) -> int:
        """How many steps the optimizer has taken with a parameter, if its direction depends on them."""
        return int(self._optimizer.state[p]["step"]) if last.direction.counts else 0

    # ------------------------------------------------------------------ around the update

    def prepare(self, lrs: Sequence[float], weights: Sequence[float]) -> None:
        """Keep what the directions will need that is lost in the update."""
        for group, lr, weight, last in zip(self._optimizer.param_groups, lrs, weights, self._last, strict=True):
            last.moved = []  # the last directions are overwritten here, and known again after the step
            moved = [p for p in group["params"] if p.grad is not None]
            coming = Last(weight, direction_of(self._optimizer, group, lr), moved)
            self._next.append(coming)
            if moved:
                self._copy(group, coming)

    def _copy(self, group: dict[str, Any], coming: Last) -> None:
        """Write what the direction of a group will need into the copies."""
        if COPY not in coming.direction.needs:
            return
        copies = [local(self._copies.place_for(p)) for p in coming.moved]
        decay = coming.direction.decay if isinstance(coming.direction, Gradient) else 0.0
        measured, changes = isinstance(coming.direction, Measured), changes_gradients(self._optimizer, group)
        parameters = [local(p.detach()) for p in coming.moved] if measured or changes or decay else []
        # torch has no public function that changes many tensors at once.
        torch._foreach_copy_(copies, parameters if measured else [local(gradient_of(p)) for p in coming.moved])
        if changes and not measured:
            to_objective(self._optimizer, group, copies, parameters)
        if decay:
            torch._foreach_add_(copies, parameters, alpha=decay)

    def remember(self, retained: Sequence[Retained | None]) -> None:
        """Keep the directions of the step that was taken."""
        for last in self._next:
            if isinstance(last.direction, Measured) and last.moved:
                copies = [local(self._copies.tensors[p]) for p in last.moved]
                torch._foreach_sub_(copies, [local(p.detach()) for p in last.moved])
        self._last, self._next = self._next, []
        self._age += 1
        self._was_wide = self._wide

    def abandon(self) -> None:
        """Drop what was prepared for a step that was not taken. The copies of the step before may be overwritten."""
        self._next, self._wide = [], self._was_wide

    def start(self) -> None:
        """Forget the copies of a former run. It is not called for a resumed run, whose step count is loaded."""
        if any(bool(local(copy).any()) for copy in self._copies.tensors.values()):
            self._notices.warn(
                "fresh start",
                "the optimizer has been tuned before, but the state of that tuning was not loaded. Tuning starts from "
                "the beginning",
            )
        self._copies.tensors.clear()

    def relocate(self) -> None:
        """Forget the directions, because they are in the state of another optimizer."""
        self._last = []

    def pause(self) -> None:
        """Forget the directions, because the steps that follow may change them unseen."""
        self.relocate()

    def make_room(self) -> None:
        """Make empty copies, so that a checkpoint can be loaded into them."""
        for group in self._optimizer.param_groups:
            if COPY in direction_of(self._optimizer, group, 0.0).needs:
                for p in group["params"]:
                    if p.grad is not None:
                        self._copies.place_for(p)

    def state_dict(self) -> dict[str, Any]:
        """Which parameters were moved, and how. The tensors are in the optimizer's state dict."""
        groups = []
        for last, group in zip(self._last, self._optimizer.param_groups, strict=False):
            own = set(map(id, last.moved))
            moved = [i for i, p in enumerate(group["params"]) if id(p) in own]
            groups.append({"weight": last.weight, "direction": last.direction.to_dict(), "moved": moved})
        return {"groups": groups, "wide": self._was_wide}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            IndexError, KeyError, TypeError, ValueError: The state is damaged, or of other groups.
        """
        wide = check_flag("wide", state_dict["wide"])
        self._last = [
            check_fields(
                Last,
                saved,
                direction=Direction.from_dict(saved["direction"]),
                moved=[group["params"][check_count("moved", i)] for i in saved["moved"]],
            )
            for saved, group in zip(state_dict["groups"], self._optimizer.param_groups, strict=False)
        ]
        self._layout, self._wide, self._was_wide = None, wide, wide


def products(
    g: Tensor, d: Tensor | None, weights: Tensor | None = None, wide: bool = True, factor: float = 1.0
) -> list[Tensor]:
    """``g·d``, ``‖g‖²`` and ``‖d‖²``, as three 0-dim tensors.

    Args:
        g: The gradient, of shape (n,).
        d: The direction over ``factor``, of shape (n,); ``None``: zero.
        weights: The weight of each number, of shape (n,); ``None``: all weights are 1.
        wide: Whether to multiply in float64 (float32 on devices without it), so that no square underflows or overflows.
        factor: By what the direction is to be multiplied.
    """
    g = g.to(exact_dtype(g.device)) if wide else g
    d = torch.zeros_like(g) if d is None else d.to(g.dtype)
    weighted = (g, d) if weights is None else (g * weights.to(g.dtype), d * weights.to(g.dtype))
    sums = [torch.dot(weighted[0], d), torch.dot(weighted[0], g), torch.dot(weighted[1], d)]
    return sums if factor == 1 else [sums[0] * factor, sums[1], sums[2] * factor**2]
