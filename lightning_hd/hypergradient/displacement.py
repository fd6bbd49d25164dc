"""Moves, the view of rules with a long horizon: where the parameters are, and where they were on average.

Let ``θ_t`` be the parameters before step ``t``. The sum of the moves is ``E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1})``.
Then ``r_t = θ_t - E_t`` is a running mean of the iterates, ``r_t = r_{t-1} + (1 - φ_{t-1}) (θ_{t-1} - r_{t-1})``. So
the optimizer need not be known. Four vectors are kept, at the coordinates of the probe: ``r``, the running mean ``Ē``
of ``E``, the last gradient and the last parameters. Source: this project.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_flag
from lightning_hd.hypergradient.probe import Bucket, Key, Range, Slot, gather, look, pack
from lightning_hd.hypergradient.view import Kept, View
from lightning_hd.notices import Notices
from lightning_hd.optimizers import coupled_decay, device_of
from lightning_hd.processes import Ranks, exact_dtype, flat_offsets, gradient_of, local

_MEAN, _LATE, _GRADIENT, _BEFORE = range(4)
"""The rows of what is kept: ``r``, ``Ē``, ``g_{t-1}`` and ``θ_{t-1}``."""

_ROWS = 4

_PART = 0.1
"""If new parameters are this part of a scope or more, its rate starts anew, because it was found without them."""


class Moves(View):
    """The derivative of the loss with respect to the logarithm of the rate that all remembered steps shared.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: Where warnings go.
    """

    width = 8

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        super().__init__(optimizer, budget, ranks, notices)
        self._parameters: list[Tensor] = []
        self._places: list[int] = []  # where the parameters lie in memory
        self._sizes: list[int] = []  # how much of each parameter this process holds
        self._sharded = any(isinstance(p, DTensor) for settings in optimizer.param_groups for p in settings["params"])
        self._buckets: list[Bucket] = []
        self._pieces: list[list[Tensor]] = []  # of the parameters, for each bucket
        self._memory: list[Tensor | None] = []  # four rows for each bucket
        self._now: list[tuple[Tensor, Tensor, Tensor]] = []  # θ, E and g of each bucket, during a step
        self._saved: dict[Key, Saved] = {}  # the state of a checkpoint
        self._updated: set[Key] = set()  # parameters that had a gradient in a remembered step
        self._present: set[Key] | None = None  # parameters that have a gradient now
        self._joined: set[int] = set()  # scopes that many parameters have joined in this step
        self._missing: frozenset[int] = frozenset()  # the places of parameters without a gradient
        self._apart: set[int] = set()  # groups whose last move did not follow their scope's rate
        self._coming: set[int] = set()  # groups whose next move will not follow it

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": []}  # a copy's parameters lie elsewhere

    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """Eight sums and three flags for each scope; see ``View.observe`` and ``further``.

        The sums are ``g·E``, ``‖g‖²``, ``‖E‖²``, ``g·Ē``, ``g·g'``, ``‖g'‖²``, ``g·Δ`` and ``‖Δ‖²``, with the last
        gradient ``g'`` and the last move ``Δ = θ_t - θ_{t-1}``.
        """
        self._prepare(scopes)
        missing = frozenset(i for i, p in enumerate(self._parameters) if p.grad is None)
        flats = [
            slot.flat(slot.p.detach() if place in missing else gradient_of(slot.p))
            for place, slot in enumerate(self.slots)
        ]
        sums = []
        self._now = []
        for bucket, pieces, memory in zip(self._buckets, self._pieces, self._memory, strict=True):
            theta = gather(pieces or bucket.views(self._flats()))
            theta = theta.to(exact_dtype(bucket.device), copy=True)
            g = self._gradient(bucket, gather(bucket.views(flats)), theta, grad_scale)
            if bucket.roots is not None:  # so that sums over the probe are estimates of those over all coordinates
                g, theta = g.mul_(bucket.roots), theta.mul_(bucket.roots)
            mask = self._mask(bucket, missing) if missing & bucket.parts.keys() else None
            g = g if mask is None else g.mul_(mask)
            moved = theta - (theta if memory is None else memory[_MEAN])
            self._now.append((theta, moved, g))
            sums.append(self._products(bucket, mask))
        if self._present is None or missing != self._missing:
            self._missing = missing
            self._present = {slot.key for place, slot in enumerate(self.slots) if place not in missing}
            self._joined = self._joining(scopes)
        known = {i for i, _ in self._present & self._updated}
        shares = [(bucket.key, *[1 / bucket.copies] * self.width) for bucket in self._buckets]
        return self._combine(sums, shares, scopes, {i for i, _ in self._present}, known, self._joined)

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

    def _products(self, bucket: Bucket, mask: Tensor | None) -> Tensor:
        """The eight sums of the bucket that was looked at last."""
        memory, (theta, moved, g) = self._memory[len(self._now) - 1], self._now[-1]
        step = theta - (theta if memory is None else memory[_BEFORE])
        late, last = (torch.zeros_like(g),) * 2 if memory is None else (memory[_LATE], memory[_GRADIENT])
        if apart := self._spans_apart(bucket):
            moved, late = moved.clone(), late.clone()
            for start, stop in apart:
                moved[start:stop], step[start:stop], late[start:stop] = 0, 0, 0
        if mask is not None:
            moved, step = moved * mask, step * mask
        pairs = ((g, moved), (g, g), (moved, moved), (g, late), (g, last), (last, last), (g, step), (step, step))
        return torch.stack([torch.dot(x, y) for x, y in pairs])

    def further(self, sums: Sequence[float]) -> dict[str, float]:
        """What an observation has beside the first three sums."""
        _, g_squared, _, late, turn, last_squared, slope, move_squared = sums
        norms = math.sqrt(g_squared) * math.sqrt(last_squared)
        return {
            "late": late,
            "turn": turn / norms if norms else 0.0,
            "slope": slope,
            "move_norm": math.sqrt(move_squared),
        }

    def forget(self, scope: int) -> None:
        """Set ``E`` to zero. The mean begins where the parameters are."""
        for i, bucket in enumerate(self._buckets):
            if bucket.key == scope:
                self._memory[i] = None

    def keep(self, group: int, lr: float, weight: float) -> None:
        """Note groups that do not follow their scopes' rates. The moves that they make now do not count."""
        if not weight:
            self._coming.add(group)

    def remember(self, kept: Sequence[Kept | None]) -> None:
        """Add the last move to the memory after a step. If numbers were not finite, the memory stays as it is."""
        for i, (bucket, (theta, moved, g)) in enumerate(zip(self._buckets, self._now, strict=True)):
            part, memory = kept[bucket.key], self._memory[i]
            if part is None:
                continue
            if memory is None:
                self._memory[i] = torch.stack([theta, torch.zeros_like(theta), g, theta])
                continue
            memory[_MEAN].add_(moved, alpha=1 - part.moves)
            memory[_LATE].lerp_(moved, part.smoothing)
            memory[_GRADIENT].copy_(g)
            memory[_BEFORE].copy_(theta)
            for start, stop in self._spans_apart(bucket):  # nothing of E counts there
                memory[_MEAN, start:stop] = theta[start:stop]
                memory[_LATE, start:stop] = 0
        self._apart, self._coming = self._coming, set()
        self._updated |= self._present or set()
        self._joined = set()
        self._now = []

    def abandon(self) -> None:
        """Drop what was kept of a step that was not taken."""
        self._now, self._coming = [], set()

    def pause(self) -> None:
        """Do nothing: a move between the steps counts as any other."""

    def make_room(self) -> None:
        """Do nothing: nothing is saved with the optimizer."""

    def _spans_apart(self, bucket: Bucket) -> list[Range]:
        return [bucket.spans[group] for group in self._apart & bucket.spans.keys()]

    def _gradient(self, bucket: Bucket, g: Tensor, theta: Tensor, grad_scale: Tensor | None) -> Tensor:
        """``g_t``, the gradient of the objective that the optimizer minimizes."""
        g = g.to(theta.dtype, copy=True)
        if grad_scale is not None:
            g /= grad_scale.to(g.device)
        for group, (start, stop) in bucket.spans.items():
            settings = self._optimizer.param_groups[group]
            if settings.get("maximize", False):
                g[start:stop].neg_()
            decay = coupled_decay(self._optimizer, settings)
            if decay:
                g[start:stop].add_(theta[start:stop], alpha=decay)
        return g

    def _mask(self, bucket: Bucket, missing: frozenset[int]) -> Tensor:
        """1 at the coordinates of parameters with a gradient, 0 at the others."""
        flags = self._tables.constant([float(place not in missing) for place in bucket.parts], bucket.device)
        lengths = self._tables.constant(bucket.lengths, bucket.device).long()
        return flags.repeat_interleave(lengths, output_size=bucket.size)  # the known size saves a wait for the device

    # ------------------------------------------------------------------ which parameters there are

    def _prepare(self, scopes: Sequence[int]) -> None:
        """Lay out the coordinates anew if parameters came, went, or lie somewhere else in memory."""
        groups = self._optimizer.param_groups
        parameters = [p for settings in groups for p in settings["params"] if p.requires_grad]
        tensors = [local(p) for p in parameters] if self._sharded else parameters
        places = list(map(Tensor.data_ptr, tensors))
        sizes = list(map(Tensor.numel, tensors))
        if self.slots and sizes == self._sizes and list(map(id, parameters)) == list(map(id, self._parameters)):
            if places != self._places:
                self._places, self._pieces = places, self._views()
            return
        before = self._local_memory()
        self._parameters, self._places, self._sizes, self._present = parameters, places, sizes, None
        found = [(i, j, p) for i, own in enumerate(groups) for j, p in enumerate(own["params"]) if p.requires_grad]
        self.slots = look(found, self._budget, self._ranks, flat_offsets(parameters, self._ranks))
        self._buckets = pack(self.slots, lambda slot: scopes[slot.group])
        self._pieces = self._views()
        self._memory = self._carried(before)
        self._saved = {}

    def _flats(self) -> list[Tensor]:
        return [slot.flat(slot.p.detach()) for slot in self.slots]

    def _views(self) -> list[list[Tensor]]:
        """Views of the parameters, to gather from in every step. A bucket that would need copies has none."""
        flats = self._flats()
        still = [flat.data_ptr() == local(slot.p).data_ptr() for flat, slot in zip(flats, self.slots, strict=True)]
        return [bucket.views(flats) if all(still[place] for place in bucket.parts) else [] for bucket in self._buckets]

    # ------------------------------------------------------------------ what was remembered

    def _local_memory(self) -> dict[Key, tuple[Slot, Tensor]]:
        """This process's part of what is kept of each parameter, in four rows."""
        parts: dict[int, list[Tensor]] = {}
        for bucket, memory in zip(self._buckets, self._memory, strict=True):
            for place, part in zip(bucket.parts, torch.split(memory, bucket.lengths, 1) if memory is not None else ()):  # noqa: B905
                parts.setdefault(place, []).append(part)
        slots = [self.slots[place] for place in parts]
        return {slot.key: (slot, torch.cat(own, 1)) for slot, own in zip(slots, parts.values(), strict=True)}

    def _carried(self, before: Mapping[Key, tuple[Slot, Tensor]]) -> list[Tensor | None]:
        """The memory for the new buckets, from the old ones or from a checkpoint; else the parameters themselves."""
        known: dict[int, Tensor] = {}
        for place, slot in enumerate(self.slots):
            former, saved = before.get(slot.key), self._saved.get(slot.key)
            if former is not None and (former[0].size, former[0].runs) == (slot.size, slot.runs):
                known[place] = former[1]
            elif saved is not None and (saved.size, saved.count) == (slot.size, slot.count):
                known[place] = saved.memory[:, slot.positions()]
        self._updated &= {self.slots[place].key for place in known}
        if not known:
            if before or self._saved:
                self._notices.warn(
                    "lost moves", "the moves are those of other parameters, so the memory of former steps starts anew"
                )
            return [None] * len(self._buckets)
        found: list[Tensor | None] = []
        taken = dict.fromkeys(known, 0)
        for bucket in self._buckets:
            theta = gather(bucket.views(self._flats())).to(exact_dtype(bucket.device), copy=True)
            theta = theta if bucket.roots is None else theta.mul_(bucket.roots)
            nothing = torch.zeros_like(theta)
            memory = torch.stack([theta, nothing, nothing, theta])
            for place, part in zip(bucket.parts, torch.split(memory, bucket.lengths, 1), strict=True):
                if place in known:
                    part.copy_(known[place][:, taken[place] : taken[place] + part.shape[1]])
                    taken[place] += part.shape[1]
            found.append(memory)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The memory at the coordinates of the whole parameters, times the square roots of their weights.

        If parameters are sharded, call it on every process.
        """
        if not self.slots or all(memory is None for memory in self._memory):
            wholes = [saved.memory for saved in self._saved.values()]
            entries = [[*key, saved.size, saved.count, saved.updated] for key, saved in self._saved.items()]
            memory = torch.cat(wholes, 1) if wholes else torch.zeros(_ROWS, 0)
            return {"parameters": entries, "memory": memory, "apart": sorted(self._apart)}
        own, device = self._local_memory(), device_of(self._optimizer)
        sharded = self._ranks.count > 1 and any(
            isinstance(slot.p, DTensor) or slot.offset is not None for slot in self.slots
        )
        wholes = []
        for slot in self.slots:
            _, part = own.get(slot.key, (slot, torch.zeros(_ROWS, 0)))
            whole = torch.zeros(_ROWS, slot.count, dtype=exact_dtype(device), device=device)
            if not sharded:
                whole = part.to(whole)
            elif self._ranks.speaks_for(slot.p) and part.shape[1]:
                whole[:, slot.positions().to(whole.device)] = part.to(whole)
            wholes.append(whole)
        updated = wholes[0].new_tensor([slot.key in self._updated for slot in self.slots])
        everything = torch.cat([torch.cat(wholes, 1).flatten(), updated])
        everything = (self._ranks.sum(everything) if sharded else everything).cpu()
        memory, updated = everything[: -len(self.slots)], everything[-len(self.slots) :]
        return {
            "parameters": [
                [*slot.key, slot.size, slot.count, bool(flag)] for slot, flag in zip(self.slots, updated, strict=True)
            ],
            "memory": memory.view(_ROWS, -1).clone(),
            "apart": sorted(self._apart),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. It takes effect in the next step.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        entries = [
            ([check_count("parameters", number) for number in numbers], check_flag("parameters", updated))
            for *numbers, updated in state_dict["parameters"]
        ]
        apart = {check_count("apart", group) for group in state_dict["apart"]}
        counts, memory = [count for (_, _, _, count), _ in entries], state_dict["memory"]
        if not isinstance(memory, Tensor) or memory.shape != (_ROWS, sum(counts)) or not bool(memory.isfinite().all()):
            raise ValueError(f"memory must be {_ROWS} times {sum(counts)} finite numbers")
        self._parameters, self.slots, self._buckets, self._memory = [], [], [], []
        self._apart, self._coming = apart, set()
        parts = torch.split(memory, counts, 1) if counts else ()
        self._saved = {
            (i, j): Saved(size, count, updated, part)
            for ((i, j, size, count), updated), part in zip(entries, parts, strict=True)
        }
        self._updated = {key for key, saved in self._saved.items() if saved.updated}


@dataclass
class Saved:
    """What a checkpoint holds of one parameter: its size, and what was kept at its coordinates in the probe."""

    size: int
    count: int
    updated: bool
    memory: Tensor  # of shape (4, count)
