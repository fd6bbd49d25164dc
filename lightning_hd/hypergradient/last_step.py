"""LastStep, the view of the paper's rules: it compares the new gradient with the direction of the last step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_number
from lightning_hd.hypergradient.copies import Copies
from lightning_hd.hypergradient.directions import (
    COPY,
    PARAMETER,
    Direction,
    Gradient,
    Measured,
    direction_from_dict,
    direction_of,
)
from lightning_hd.hypergradient.probe import Bucket, gather, look, pack
from lightning_hd.hypergradient.products import is_doubtful, products
from lightning_hd.hypergradient.view import Kept, View
from lightning_hd.notices import Notices
from lightning_hd.optimizers import coupled_decay, objective_gradient
from lightning_hd.processes import Ranks, gradient_of, local, widen

_GRADIENT = "gradient"


@dataclass
class Last:
    """The last step of one parameter group."""

    weight: float = 0.0  # derivative of the group's rate with respect to the scope's
    direction: Direction | None = None
    moved: list[Tensor] = field(default_factory=list)  # the parameters that were updated


class LastStep(View):
    """The derivative of the loss with respect to the last rate, ``h_t = -g_t · d_{t-1}`` (Section 3 of the paper).

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.
        copies: The tensors of the parameters' size that are kept.
    """

    def __init__(
        self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices, copies: Copies
    ) -> None:
        super().__init__(optimizer, budget, ranks, notices)
        self._copies = copies
        self._last: list[Last] = []
        self._next: list[Last] = []  # filled during a step
        self._steps: dict[int, int] = {}  # steps taken with each parameter, by its id, if its direction depends on them
        self._loads = copies.loads
        self._layout: Any = None  # the layout that the buckets are made for
        self._known: set[int] = set()  # groups whose last direction is known
        self._youngest: dict[int, Tensor] = {}  # a parameter with the most steps, for the groups that are alike
        self._buckets: list[Bucket] = []

    # ------------------------------------------------------------------ before a step

    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """For each scope ``-g·d``, ``‖g‖²``, ``‖d‖²`` and three flags; see ``View.observe``."""
        self._last += [Last() for _ in self._optimizer.param_groups[len(self._last) :]]
        if self._loads != self._copies.loads:
            self._loads, self._steps = self._copies.loads, {}
        self._prepare(scopes)
        flats: dict[tuple[str, int], Tensor] = {}
        spare: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        sums, factors = [], []
        for bucket in self._buckets:
            group, age = bucket.key
            last, get = self._last[group], _Reader(self, bucket, flats, spare)
            d = None
            if age is not None and last.direction is not None:
                d = last.direction.read(get, self._latest(group) - age)
            settings = self._optimizer.param_groups[group]
            g = objective_gradient(self._optimizer, settings, get(_GRADIENT), partial(get, PARAMETER), grad_scale)
            sums.append(products(g, d, bucket.weights, wide, get.spare(g, "product")))
            share = 1 / bucket.copies
            factors.append((scopes[group], -last.weight * share, share, last.weight**2 * share))
        return self._combine(sums, factors, scopes, {slot.group for slot in self.slots}, self._known)

    def is_doubtful(self, sums: Sequence[Sequence[float]]) -> bool:
        """Whether a norm may be wrong because of underflow or overflow."""
        return any(known and is_doubtful(*squares) for _, *squares, _, known, _ in sums)

    def measured(self, group: int) -> bool:
        """Whether the direction of a group was measured, in a step that moved it."""
        last = self._last[group] if group < len(self._last) else Last()
        return isinstance(last.direction, Measured) and last.direction.lr * last.weight != 0

    def _prepare(self, scopes: Sequence[int]) -> None:
        """Lay out the parameters that have a gradient, unless the last layout still holds."""
        alike = self._alike(scopes)
        now = [[p for p in settings["params"] if p.grad is not None] for settings in self._optimizer.param_groups]
        moved = [list(map(id, last.moved)) for last in self._last]
        layout = (alike, [list(map(id, own)) for own in now], [list(map(Tensor.numel, own)) for own in now])
        if layout == self._layout and layout[1] == moved and self._is_complete(now):
            return
        seen: list[tuple[int, int, Tensor]] = []
        steps: dict[int, int] = {}
        for i, (settings, last) in enumerate(zip(self._optimizer.param_groups, self._last, strict=True)):
            for j, p in enumerate(settings["params"]):
                if p.grad is not None:
                    seen.append((i, j, p))
                    if id(p) in moved[i] and self._is_there(last, p):
                        steps[id(p)] = self._steps_of(last, p)
        latest = dict.fromkeys(alike, 0)
        for i, _, p in seen:
            latest[alike[i]] = max(latest[alike[i]], steps.get(id(p), 0))
        ages = {id(p): latest[alike[i]] - steps[id(p)] for i, _, p in seen if id(p) in steps}
        self._known = {i for i, _, p in seen if id(p) in steps}
        self._youngest = {alike[i]: p for i, _, p in seen if ages.get(id(p)) == 0}
        self.slots = look(seen, self._budget, self._ranks, {})
        self._buckets = pack(self.slots, lambda slot: (alike[slot.group], ages.get(id(slot.p))))
        # The layout may serve again only if the last direction of every parameter with a gradient is known.
        self._layout = layout if len(steps) == len(seen) else None

    def _is_complete(self, now: Sequence[Sequence[Tensor]]) -> bool:
        """Whether all tensors are there from which directions are computed."""
        for last, own in zip(self._last, now, strict=True):
            for name in last.direction.needs if last.direction is not None else ():
                if any(tensor is None for tensor in map(self._finder(name), own)):
                    return False
        return True

    def _finder(self, name: str) -> Callable[[Tensor], Tensor | None]:
        """A function that returns the tensor of this name for a parameter, or ``None``."""
        state, nothing = self._optimizer.state, dict[str, Any]()
        return self._copies.tensors.get if name == COPY else lambda p: state.get(p, nothing).get(name)

    def _latest(self, group: int) -> int:
        """How many steps the optimizer has taken with the groups that are alike."""
        p = self._youngest.get(group)
        return 0 if p is None else self._steps_of(self._last[group], p)

    def _is_there(self, last: Last, p: Tensor) -> bool:
        """Whether all tensors are there from which the direction of a parameter is computed; warns otherwise."""
        for name in () if last.direction is None else last.direction.needs:
            tensor = self._finder(name)(p)
            if tensor is None or tensor.shape != p.shape:
                self._notices.warn(
                    "lost direction",
                    "the optimizer's state has lost the last direction, so the learning rate stays as it is for one "
                    "step. Was the state loaded from a checkpoint that was written without tuning?",
                )
                return False
        return True

    def _steps_of(self, last: Last, p: Tensor) -> int:
        """How many steps the optimizer has taken with a parameter. It is read once, and counted from then on."""
        if last.direction is None or not last.direction.counts:
            return 0
        if id(p) not in self._steps:
            self._steps[id(p)] = int(self._optimizer.state[p]["step"])
        return self._steps[id(p)]

    def _alike(self, scopes: Sequence[int]) -> list[int]:
        """For each group, the first group whose directions and gradients are computed with the same numbers."""
        first: dict[Any, int] = {}
        numbers = [
            (last.weight, last.direction, settings.get("maximize", False), coupled_decay(self._optimizer, settings))
            for settings, last in zip(self._optimizer.param_groups, self._last, strict=True)
        ]
        return [first.setdefault((scope, *own), i) for i, (scope, own) in enumerate(zip(scopes, numbers, strict=True))]

    def tensors(self, name: str, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """A quantity of some parameters."""
        if name == _GRADIENT:
            return [gradient_of(p) for p in parameters]
        if name == PARAMETER:
            return [p.detach() for p in parameters]
        if name == COPY:
            return [self._copies.tensors[p] for p in parameters]
        return [self._optimizer.state[p][name] for p in parameters]

    # ------------------------------------------------------------------ around the update

    def keep(self, group: int, lr: float, weight: float) -> None:
        """Keep what the direction of a group will need. Call it before the update at rate ``lr``."""
        settings = self._optimizer.param_groups[group]
        direction = direction_of(self._optimizer, settings, lr)
        moved = [p for p in settings["params"] if p.grad is not None]
        self._last[group].moved = []  # the last directions are overwritten here, and known again after the step
        self._next.append(Last(weight, direction, moved))
        if not direction.copies or not moved:
            return
        # torch has no public function that copies many tensors at once.
        copies = [local(self._copies.place_for(p)) for p in moved]
        parameters = [local(p.detach()) for p in moved]
        if isinstance(direction, Measured):
            torch._foreach_copy_(copies, parameters)
            return
        torch._foreach_copy_(copies, [local(gradient_of(p)) for p in moved])
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(copies, scale.to(copies[0].device))
        if settings.get("maximize", False):
            torch._foreach_neg_(copies)
        decay = coupled_decay(self._optimizer, settings) + (direction.decay if isinstance(direction, Gradient) else 0.0)
        if decay:
            torch._foreach_add_(copies, parameters, alpha=decay)

    def remember(self, kept: Sequence[Kept | None]) -> None:
        """Keep the directions of the step that was taken."""
        for last in self._next:
            if isinstance(last.direction, Measured) and last.moved:
                copies = [local(self._copies.tensors[p]) for p in last.moved]
                torch._foreach_sub_(copies, [local(p.detach()) for p in last.moved])
            if last.direction is not None and last.direction.counts:
                for key in map(id, last.moved):
                    if key in self._steps:
                        self._steps[key] += 1
        self._last, self._next = self._next, []

    def abandon(self) -> None:
        """Drop what was kept of a step that was not taken. The copies of the step before may be overwritten."""
        self._next = []

    def start(self) -> None:
        """Forget the copies of a former run. It is not called for a resumed run, whose step count is loaded."""
        if any(bool(local(copy).any()) for copy in self._copies.tensors.values()):
            self._notices.warn(
                "fresh start",
                "the optimizer has been tuned before, but the state of that tuning was not loaded. Tuning starts from "
                "the beginning",
            )
        self._copies.tensors.clear()

    def pause(self) -> None:
        """Forget the directions, because the steps that follow may change them unseen."""
        for last in self._last:
            last.moved = []

    def make_room(self) -> None:
        """Make empty copies, so that a checkpoint can be loaded into them."""
        for settings in self._optimizer.param_groups:
            if direction_of(self._optimizer, settings, 0.0).copies:
                for p in settings["params"]:
                    if p.grad is not None:
                        self._copies.place_for(p)

    def state_dict(self) -> list[dict[str, Any]]:
        """Which parameters were moved, and how. The tensors are in the optimizer's state dict."""
        groups = zip(self._last, self._optimizer.param_groups, strict=False)
        return [
            {
                "weight": last.weight,
                "direction": None if last.direction is None else last.direction.to_dict(),
                "moved": [i for i, p in enumerate(settings["params"]) if any(p is q for q in last.moved)],
            }
            for last, settings in groups
        ]

    def load_state_dict(self, state_dict: list[dict[str, Any]]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            IndexError, KeyError, TypeError, ValueError: The state is damaged, or of other groups.
        """
        groups = zip(state_dict, self._optimizer.param_groups, strict=False)
        self._last = [
            Last(
                check_number("weight", saved["weight"]),
                None if saved["direction"] is None else direction_from_dict(saved["direction"]),
                [settings["params"][check_count("moved", i)] for i in saved["moved"]],
            )
            for saved, settings in groups
        ]
        self._steps = {}


class _Reader:
    """Gathers the quantities of one bucket."""

    def __init__(self, view: LastStep, bucket: Bucket, flats: dict[Any, Tensor], spare: dict[Any, Tensor]) -> None:
        self._view = view
        self._bucket = bucket
        self._flats = flats
        self._spare = spare

    def __call__(self, name: str) -> Tensor:
        places = [place for place in self._bucket.parts if (name, place) not in self._flats]
        slots = [self._view.slots[place] for place in places]
        for place, slot, tensor in zip(places, slots, self._view.tensors(name, [s.p for s in slots]), strict=True):
            self._flats[name, place] = slot.flat(tensor)
        own = {place: self._flats[name, place] for place in self._bucket.parts}
        return widen(gather(self._bucket.views(own)))

    def spare(self, like: Tensor, what: str = "direction") -> Tensor:
        """A tensor to write to. All buckets use the same one, so that its memory stays in the cache."""
        known = self._spare.get((what, like.dtype, like.device))
        if known is None or len(known) < len(like):
            known = self._spare[what, like.dtype, like.device] = torch.empty_like(like)
        return known[: len(like)]
