"""Displacement, the view of rules with a long horizon: where the parameters are, and where they were on average.

Let ``θ_t`` be the parameters before step ``t``. The sum of the moves is ``E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1})``.
So the optimizer need not be known. Four vectors are kept, at the coordinates of the probe: ``E``, its running mean
``Ē``, the last gradient and the last parameters. Source: this project.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_fields, check_flag, save_fields
from lightning_hd.hypergradient.buckets import ROWS, Bucket, Memory, are_safe, flatten, pack
from lightning_hd.hypergradient.memory import Remembered, Saved, by_bucket, by_key, by_parameter, whole
from lightning_hd.hypergradient.probe import Key, look
from lightning_hd.hypergradient.view import Retained, Sight, View
from lightning_hd.optimizers import device_of, parameters_of, to_objective
from lightning_hd.processes import Notices, Ranks, exact_dtype, flat_offsets, gradient_of, local
from lightning_hd.rules import Observation

_PART = 0.1
"""If new parameters are this part of a scope or more, its rate starts anew, because it was found without them."""


class _Sums(NamedTuple):
    """The numbers of one scope: three flags, and nine sums over the coordinates. ``Δ`` is the last move."""

    has_gradient: float
    known: float
    joined: float
    derivative: float  # g·E
    late: float  # g·Ē
    turn: float  # g_t·g_{t-1}
    slope: float  # g·Δ
    g_squared: float
    last_squared: float  # ‖g_{t-1}‖²
    sum_squared: float  # ‖E‖²
    move_squared: float  # ‖Δ‖²
    param_squared: float  # ‖θ‖²


_WIDTH = len(_Sums._fields) - 3


def _is_awake(p: Tensor) -> bool:
    """Whether a parameter needs a gradient. That of a lazy module has no shape before the first forward pass."""
    return p.requires_grad and not is_lazy(p)


class Displacement(View):
    """The derivative of the loss with respect to the logarithm of the rate that all remembered steps shared.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.
    """

    width = len(_Sums._fields)

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        super().__init__(optimizer, budget, ranks, notices)
        self._sharded = any(isinstance(p, DTensor) for p in parameters_of(optimizer))
        self._device = device_of(optimizer)  # on which sums are computed
        self._parameters: list[Tensor] = []
        self._places: list[int] = []  # where the parameters lie in memory
        self._sizes: list[int] = []  # how much of each parameter this process holds
        self._buckets: list[Bucket] = []
        self._pieces: list[list[Tensor]] = []  # of the parameters, for each bucket; none where they would be copies
        self._memory: list[Memory] = []  # of each bucket
        self._loaded: tuple[list[Saved], Tensor] = ([], torch.zeros(ROWS, 0))  # of a checkpoint, until the next step
        self._elsewhere = False  # whether others have set the parameters to where they are
        self._missing: frozenset[int] = frozenset()  # the places of parameters without a gradient
        self._present: set[Key] | None = None  # parameters that have a gradient now
        self._updated: set[Key] = set()  # parameters that had a gradient in a remembered step
        self._count(parameters_of(optimizer))
        self._joined: set[int] = set()  # scopes that many parameters have joined in this step
        self._apart: set[int] = set()  # groups whose last move did not follow their scope's rate
        self._coming: set[int] = set()  # groups whose next move will not follow it

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": []}  # a copy's parameters lie elsewhere

    # ------------------------------------------------------------------ one step

    def observe(self, scopes: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
        """The numbers of ``_Sums`` for each scope; see ``View.observe``."""
        flats, missing = self._arrive(scopes, parameters)
        rows = [self._look(i, flats, missing) for i in range(len(self._buckets))]
        if self._present is None or missing != self._missing:
            self._missing = missing
            self._present = {slot.key for place, slot in enumerate(self.slots) if place not in missing}
            self._joined = self._joining(scopes)
            lacking = {self.slots[place].key for place in missing} - self._updated
            self.unused = [slot.p for slot in self.slots if slot.key in lacking]
        with_gradient = {scopes[group] for group, _ in self._present}
        remembered = {bucket.key for bucket, memory in zip(self._buckets, self._memory, strict=True) if memory.known}
        known = {scopes[group] for group, _ in self._present & self._updated} & remembered
        flags = [(i in with_gradient, i in known, i in self._joined) for i in range(max(scopes) + 1)]
        factors = [(bucket.key, *[1 / bucket.replicas] * _WIDTH) for bucket in self._buckets]
        return self._sums.by_scope(rows, factors, flags, self._device, _WIDTH)

    def note(self, scopes: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Take the gradients and parameters of this step for the last ones; see ``View.note``."""
        flats, missing = self._arrive(scopes, parameters)
        for i, memory in enumerate(self._memory):
            if memory.known:
                self._gather(i, flats, missing)
                memory.note()

    def _arrive(self, scopes: Sequence[int], everything: Sequence[Tensor]) -> tuple[list[Tensor], frozenset[int]]:
        """The gradients of all parameters, or anything where they are missing; and the places of these."""
        self._lay_out(scopes, self._count(everything))
        if self._elsewhere:
            self._elsewhere = False
            for i, memory in enumerate(self._memory):
                self._locate(i)
                memory.last.theta.copy_(memory.now.theta)
        gradients = [p.grad for p in self._parameters]
        missing = frozenset(place for place, g in enumerate(gradients) if g is None)
        if self._sharded:
            gradients = [g if g is None else gradient_of(p) for p, g in zip(self._parameters, gradients, strict=True)]
        there = [p.detach() if g is None else g for p, g in zip(self._parameters, gradients, strict=True)]
        return flatten(self.slots, there), missing

    def _gather(self, i: int, flats: Sequence[Tensor], missing: frozenset[int]) -> Tensor | None:
        """Gather the parameters and the gradient of a bucket. Return which coordinates have one; ``None``: all."""
        bucket, now = self._buckets[i], self._memory[i].now
        self._gather_parameters(i)
        bucket.gather(flats, now.g)
        for group, (start, stop) in bucket.spans.items():
            param_group = self._optimizer.param_groups[group]
            to_objective(self._optimizer, param_group, [now.g[start:stop]], [now.theta[start:stop]])
        bucket.weigh(now.g, now.theta)
        mask = self._mask(bucket, missing) if missing & bucket.parts.keys() else None
        if mask is not None:
            now.g.mul_(mask)
        return mask

    def _gather_parameters(self, i: int) -> None:
        theta, pieces = self._memory[i].now.theta, self._pieces[i]
        if pieces:
            torch.cat(pieces, out=theta)
        else:
            self._buckets[i].gather(self._flats(), theta)

    def _locate(self, i: int) -> None:
        """Gather the parameters of a bucket, outside of a step."""
        self._gather_parameters(i)
        self._buckets[i].weigh(self._memory[i].now.theta)

    def _look(self, i: int, flats: Sequence[Tensor], missing: frozenset[int]) -> list[Tensor]:
        """The nine sums of a bucket."""
        memory, mask = self._memory[i], self._gather(i, flats, missing)
        if not memory.known:
            memory.begin()
        memory.arrive()
        spans = self._buckets[i].spans
        for start, stop in [spans[group] for group in self._apart & spans.keys()]:  # nothing of E counts there
            for vector in (memory.now.moved, memory.move, memory.late):
                vector[start:stop] = 0
        g, moved, move = memory.now.g, memory.now.moved, memory.move
        if mask is not None:
            moved, move = moved * mask, move * mask
        along = [self._dot(g, vector) for vector in (moved, memory.late, memory.last.g, move)]
        return along + [self._dot(vector, vector) for vector in (g, memory.last.g, moved, move, memory.now.theta)]

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        if self._wide:
            exact = exact_dtype(a.device)
            a, b = a.to(exact), b.to(exact)
        return torch.dot(a, b)

    def _mask(self, bucket: Bucket, missing: frozenset[int]) -> Tensor:
        """1 at the coordinates of parameters with a gradient, 0 at the others."""
        flags = self._sums.constant([place not in missing for place in bucket.parts], bucket.device)
        lengths = self._sums.constant(bucket.lengths, bucket.device).long()
        return flags.to(bucket.dtype).repeat_interleave(lengths, output_size=bucket.size)  # the size saves a wait

    def _joining(self, scopes: Sequence[int]) -> set[int]:
        """Scopes in which a large part of the parameters has its first gradient, while others had one before."""
        sizes: dict[int, list[int]] = {}  # of all parameters in a scope, and of the new ones
        for slot in self.slots:
            if self._present and slot.key in self._present:
                own = sizes.setdefault(scopes[slot.group], [0, 0])
                own[0] += slot.size
                own[1] += slot.size * (slot.key not in self._updated)
        known = {scopes[group] for group, _ in self._updated}
        return {scope for scope, (size, new) in sizes.items() if _PART * size <= new and scope in known}

    def sights(self, sums: Sequence[Sequence[float]]) -> list[Sight]:
        """What the step shows of each scope."""
        table = [_Sums(*row) for row in sums]
        squares = [x for row in table for x in (row.g_squared, row.param_squared)]
        squares += [x for row in table if row.known for x in (row.last_squared, row.sum_squared, row.move_squared)]
        sights = [self._sight(row) for row in table]
        self._wide = not are_safe(squares) if squares else self._wide
        return sights

    def _sight(self, sums: _Sums) -> Sight:
        g_norm, norms = math.sqrt(sums.g_squared), math.sqrt(sums.g_squared) * math.sqrt(sums.last_squared)
        e_norm, *lengths = map(math.sqrt, (sums.sum_squared, sums.move_squared, sums.param_squared))
        turn = sums.turn / norms if norms else 0.0
        observation = Observation(sums.derivative, g_norm, e_norm, sums.late, turn, sums.slope, *lengths)
        gradient, known = sums.has_gradient > 0, sums.known > 0
        joined = sums.joined > 0 and sums.joined > self._ranks.count / 2  # else gradients may only have been missing
        return Sight(gradient, known, observation, joined, lost=gradient and not known)

    def forget(self, scope: int) -> None:
        """Set ``E`` to zero."""
        for bucket, memory in zip(self._buckets, self._memory, strict=True):
            if bucket.key == scope:
                memory.forget()

    def relocate(self) -> None:
        """Keep ``E``, and let the mean follow the parameters to where they are."""
        self._elsewhere = True

    def prepare(self, lrs: Sequence[float], weights: Sequence[float]) -> None:
        """Note groups that do not follow their scopes' rates. The moves that they make now do not count."""
        self._coming = {group for group, weight in enumerate(weights) if not weight}

    def pass_over(self) -> None:
        """Note the groups whose moves do not count, after a step that was not looked at."""
        self._apart, self._coming, self._was_wide = self._apart | self._coming, set(), self._wide

    def remember(self, retained: Sequence[Retained | None]) -> None:
        """Add the last moves to the memory after a step. If numbers were not finite, the memory stays as it is."""
        for bucket, memory in zip(self._buckets, self._memory, strict=True):
            part = retained[bucket.key]
            if part is None:
                memory.repair()
            else:
                memory.remember(part.moves, part.smoothing)
        self._apart, self._coming, self._was_wide = self._coming, set(), self._wide
        self._updated |= self._present or set()
        self._joined = set()

    def abandon(self) -> None:
        """Drop what was prepared for a step that was not taken."""
        self._coming, self._wide = set(), self._was_wide

    def _count(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Note which parameters need no gradient, or have no shape yet. Return the others."""
        self.asleep = [p for p in parameters if not _is_awake(p)]
        return [p for p in parameters if _is_awake(p)]

    # ------------------------------------------------------------------ which parameters there are

    def _lay_out(self, scopes: Sequence[int], parameters: list[Tensor]) -> None:
        """Lay out the coordinates anew if parameters came, went, or lie somewhere else in memory."""
        tensors = [local(p) for p in parameters] if self._sharded else parameters
        places, sizes = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))
        if self.slots and sizes == self._sizes and list(map(id, parameters)) == list(map(id, self._parameters)):
            if places != self._places:
                self._places, self._pieces = places, self._views()
            return
        loaded = by_key(*self._loaded)
        before = loaded or by_parameter(self.slots, self._buckets, self._memory)
        keys = {id(slot.p): slot.key for slot in self.slots}
        self._parameters, self._places, self._sizes, self._present = parameters, places, sizes, None
        self._device = device_of(self._optimizer)
        groups = enumerate(self._optimizer.param_groups)
        found = [(i, j, p) for i, group in groups for j, p in enumerate(group["params"]) if _is_awake(p)]
        self._choose(look(found, self.budget, self._ranks, flat_offsets(parameters, self._ranks)))
        self._buckets = pack(self.slots, lambda slot: scopes[slot.group])
        self._pieces = self._views()
        self._memory = [Memory(bucket.size, bucket.dtype, bucket.device) for bucket in self._buckets]
        self._carry(before, keys)
        self._loaded = ([], torch.zeros(ROWS, 0))

    def _flats(self) -> list[Tensor]:
        return flatten(self.slots, [p.detach() for p in self._parameters])

    def _views(self) -> list[list[Tensor]]:
        """The pieces of the parameters for each bucket, to gather from in every step; none where they are copies."""
        flats = self._flats()
        copied = {
            place
            for place, (slot, flat) in enumerate(zip(self.slots, flats, strict=True))
            if flat.data_ptr() != local(slot.p).data_ptr()
        }
        return [[] if copied & bucket.parts.keys() else bucket.views(flats) for bucket in self._buckets]

    def _carry(self, before: dict[Key, Remembered], keys: dict[int, Key]) -> None:
        """Fill the memory of new buckets. A parameter is known by itself, else by its place, where it was set anew."""
        sources = [keys.get(id(slot.p), slot.key) for slot in self.slots]
        fits = {i: before[key].fit(self.slots[i]) for i, key in enumerate(sources) if key in before}
        known = {place: rows for place, rows in fits.items() if rows is not None}
        self._updated = {slot.key for slot, key in zip(self.slots, sources, strict=True) if key in self._updated}
        replaced = {place for place in known if keys and id(self.slots[place].p) not in keys}
        if before and not known:
            self._updated = set()
            self._notices.warn("lost moves", "all parameters are other ones, so the memory of former steps starts anew")
        for i, memory in enumerate(self._memory if known else ()):
            self._locate(i)
            memory.begin()
        by_bucket(self._buckets, self._memory, known, replaced)

    # ------------------------------------------------------------------ what is saved

    def state_dict(self) -> dict[str, Any]:
        """The memory at the coordinates of the whole parameters, times the square roots of their weights.

        If parameters are sharded, call it on every process.
        """
        saved, rows = self._loaded
        if self.slots:
            own = by_parameter(self.slots, self._buckets, self._memory)
            saved, rows = whole(self.slots, own, self._updated, self._ranks, self._device)
        return {
            "parameters": [save_fields(own) for own in saved],
            "memory": rows,
            "apart": sorted(self._apart),
            "wide": self._was_wide,
            "elsewhere": self._elsewhere,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. It takes effect in the next step.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        saved = [check_fields(Saved, entry) for entry in state_dict["parameters"]]
        apart = {check_count("apart", group) for group in state_dict["apart"]}
        wide, elsewhere = (check_flag(name, state_dict[name]) for name in ("wide", "elsewhere"))
        counts, rows = [own.count for own in saved], state_dict["memory"]
        if not isinstance(rows, Tensor) or rows.shape != (ROWS, sum(counts)) or not bool(rows.isfinite().all()):
            raise ValueError(f"memory must be {ROWS} times {sum(counts)} finite numbers")
        self._choose([])
        self._parameters, self._buckets, self._memory = [], [], []
        self._apart, self._coming, self._elsewhere, self._wide, self._was_wide = apart, set(), elsewhere, wide, wide
        self._loaded = saved, rows
        self._updated = {own.key for own in saved if own.updated}
        seen, groups = {own.key for own in saved}, enumerate(self._optimizer.param_groups)
        now = {(i, j): p for i, group in groups for j, p in enumerate(group["params"])}
        self.asleep = [p for key, p in now.items() if key not in seen]
        self.unused = [p for key, p in now.items() if key in seen - self._updated]
