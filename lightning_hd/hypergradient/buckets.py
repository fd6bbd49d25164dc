"""Buckets: coordinates of several parameters, gathered into one flat vector; their memory, and sums by scope."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hd.hypergradient.probe import Range, Slot
from lightning_hd.processes import as_real, exact_dtype, local

_CACHED, _LAUNCHED = 2**18, 2**24
"""The largest number of coordinates in a bucket. On a CPU they should stay in the cache, elsewhere launches be few."""

_SMALL, _LARGE = 1e-16, 1e24
"""As long as the squared norms of the last step lie in between, squares in float32 are safe: in one step, a norm would
have to grow or shrink by a million times."""

ROWS = 4
"""The number of vectors that are remembered: ``E_t``, ``Ē``, ``g_{t-1}`` and ``θ_{t-1}``."""

_SHORT = 2**11
"""A tensor of at most so many numbers is copied as a whole, because a view of some of them takes as long to make."""

_FEW = 4
"""Up to so many views take less time one by one."""

_CONSTANTS = 16
"""How many constants stay on the device. A step needs a few, which seldom change."""


@dataclass
class Stretch:
    """Coordinates of a bucket that are gathered at once.

    Args:
        start: Where they begin in the bucket.
        stop: Where they end.
        pieces: The place of the slot of each tensor, and the ranges to cut out of it; none: it is copied as a whole.
        wanted: The ranges of what was copied that the bucket has.
        copied: How many numbers are copied.
    """

    start: int
    stop: int
    pieces: list[tuple[int, Sequence[Range]]] = field(default_factory=list)
    wanted: list[Range] = field(default_factory=list)
    copied: int = 0
    _places: Tensor | None = None  # ``wanted``, one by one

    def add(self, place: int, runs: Sequence[Range], numel: int) -> None:
        """Add ranges of a tensor that has ``numel`` numbers."""
        length = sum(stop - start for start, stop in runs)
        whole = numel <= max(_SHORT, length)
        self.pieces.append((place, () if whole else runs))
        ranges = runs if whole else [(0, length)]
        self.wanted += [(self.copied + start, self.copied + stop) for start, stop in ranges]
        self.copied += numel if whole else length
        self.stop += length

    def gather(self, flats: Sequence[Tensor], out: Tensor) -> None:
        """Write the numbers into the vector of the bucket."""
        pieces: list[Tensor] = []
        for place, runs in self.pieces:
            pieces += cut(flats[place], runs) if runs else [flats[place]]
        own = out[self.start : self.stop]
        if self.copied == self.stop - self.start:
            torch.cat(pieces, out=own)
            return
        if self._places is None:
            self._places = torch.cat([torch.arange(*run) for run in self.wanted]).to(out.device)
        torch.index_select(torch.cat(pieces).to(out.dtype), 0, self._places, out=own)


@dataclass
class Bucket:
    """Coordinates of several parameters, gathered into one flat vector.

    Args:
        key: What the parameters have in common.
        device: The device of the parameters.
        replicas: The number of processes that hold the same elements.
        size: The number of coordinates.
        parts: For each parameter, the place of its slot and the ranges in this process's part of it.
        wholes: The places of the parameters of which the bucket has all that this process holds.
        spans: The range of the coordinates of each parameter group.
        roots: The square roots of the numbers of coordinates for which each one stands; ``None``: all are 1.
        dtype: That of the parameters, float32 at least.
        stretches: The coordinates in the order of ``parts``, by what is gathered at once.
    """

    key: Any
    device: torch.device
    replicas: float
    size: int = 0
    parts: dict[int, list[Range]] = field(default_factory=dict)
    wholes: set[int] = field(default_factory=set)
    spans: dict[int, Range] = field(default_factory=dict)
    roots: Tensor | None = None
    dtype: torch.dtype = torch.float32
    stretches: list[Stretch] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """The number of coordinates of each parameter."""
        return [sum(stop - start for start, stop in runs) for runs in self.parts.values()]

    @property
    def weights(self) -> Tensor | None:
        """The number of coordinates for which each one stands; ``None``: all stand for one."""
        return None if self.roots is None else self.roots.square()

    def add(self, place: int, slot: Slot, run: Range) -> None:
        """Add a range of one parameter."""
        self.parts.setdefault(place, []).append(run)
        self.dtype = torch.promote_types(self.dtype, slot.dtype)
        if run == (0, slot.numel):
            self.wholes.add(place)
        begin, _ = self.spans.get(slot.group, (self.size, 0))
        self.size += run[1] - run[0]
        self.spans[slot.group] = (begin, self.size)

    def weigh(self, *vectors: Tensor) -> None:
        """Scale vectors so that dot products are estimates of those over all coordinates."""
        if self.roots is not None:
            for vector in vectors:
                vector.mul_(self.roots)

    def views(self, flats: Sequence[Tensor] | Mapping[int, Tensor]) -> list[Tensor]:
        """The pieces of the bucket, as views of the flat tensors of all slots."""
        pieces: list[Tensor] = []
        for place, runs in self.parts.items():
            pieces += [flats[place]] if place in self.wholes else cut(flats[place], runs)
        return pieces

    def gather(self, flats: Sequence[Tensor], out: Tensor) -> None:
        """Write the numbers of the bucket into a vector of its size."""
        for stretch in self.stretches:
            stretch.gather(flats, out)


class Point(NamedTuple):
    """What is known of one step in a bucket."""

    moved: Tensor  # E
    g: Tensor
    theta: Tensor


class Memory:
    """What is remembered of one bucket, and room for what the present step shows.

    All vectors stay, because new ones of their size come anew from the system in every step. A step that is taken
    changes places with the last one.

    Args:
        size: The number of coordinates.
        dtype: That of the vectors.
        device: Their device.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        # Each one by itself, because sums may differ in their last bits where vectors begin at other places.
        vectors = [torch.zeros(size, dtype=dtype, device=device) for _ in range(2 * ROWS)]
        self.last, self.now = Point(*vectors[:3]), Point(*vectors[3:6])
        self.late, self.move = vectors[6:]  # Ē, and θ_t - θ_{t-1}
        self.known = False  # whether there was a step before

    @property
    def rows(self) -> list[Tensor]:
        """What is remembered."""
        return [self.last.moved, self.late, self.last.g, self.last.theta]

    def begin(self) -> None:
        """Remember that the parameters have been where they are."""
        for row in self.rows[:3]:
            row.zero_()
        self.last.theta.copy_(self.now.theta)

    def arrive(self) -> None:
        """Compute ``E_t`` and the last move, when the parameters of this step are there."""
        torch.sub(self.now.theta, self.last.theta, out=self.move)
        torch.add(self.last.moved, self.move, out=self.now.moved)

    def note(self) -> None:
        """Take the parameters and the gradient of this step for the last ones. No move is lost."""
        self.arrive()
        self.now.g.nan_to_num_(0.0, 0.0, 0.0)
        self.last, self.now = self.now, self.last

    def remember(self, kept: float, smoothing: float) -> None:
        """Take this step for the last one."""
        self.late.lerp_(self.now.moved, smoothing)
        self.now.moved.mul_(kept)
        self.last, self.now, self.known = self.now, self.last, True

    def forget(self) -> None:
        """Set ``E`` to zero, also that of this step."""
        self.known = False
        self.now.moved.zero_()
        self.late.zero_()

    def repair(self) -> None:
        """Drop what is not finite, which would stay for ever."""
        for row in self.rows[:3]:
            row.nan_to_num_(0.0, 0.0, 0.0)
        self.last.theta.copy_(torch.where(self.last.theta.isfinite(), self.last.theta, self.now.theta))


def flatten(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of tensors of the parameters' shapes, in one dimension: views if possible."""
    flats = []
    for slot, tensor in zip(slots, tensors, strict=True):
        if not slot.is_plain:
            tensor = as_real(local(tensor))
            tensor = tensor if slot.order is None else tensor.permute(slot.order)
        flats.append(tensor if tensor.dim() == 1 else tensor.reshape(-1))
    return flats


def cut(flat: Tensor, runs: Sequence[Range]) -> list[Tensor]:
    """Views of ascending ranges of a flat tensor."""
    if len(runs) <= _FEW:
        return [flat[slice(*run)] for run in runs]
    edges = [0, *chain(*runs)]  # one operation for all: they are every second part, between the gaps
    sizes = [stop - start for start, stop in pairwise(edges)]
    return list(flat[: edges[-1]].split_with_sizes(sizes)[1::2])


def gather(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces of a bucket as one vector; a view if there is only one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def pack(
    slots: Sequence[Slot], key: Callable[[Slot], Hashable], cached: int = _CACHED, alone: float = math.inf
) -> list[Bucket]:
    """Pack slots, in the order of their groups, into buckets for one key, device and number of replicas each.

    Args:
        slots: The slots.
        key: What the parameters of a bucket have in common.
        cached: The largest number of coordinates in a bucket on a CPU.
        alone: On a CPU, a parameter of so many coordinates has buckets of its own, so that none is copied.
    """
    buckets: list[Bucket] = []
    filling: dict[Hashable, Bucket] = {}
    for place, slot in enumerate(slots):
        device = local(slot.p).device
        limit = cached if device.type == "cpu" else _LAUNCHED
        kind = (key(slot), device, slot.replicas)
        own = (kind, place if device.type == "cpu" and slot.numel >= alone else None)
        for start, stop in slot.runs:
            while start < stop:
                if own not in filling or filling[own].size == limit:
                    filling[own] = Bucket(*kind)
                    buckets.append(filling[own])
                end = min(stop, start + limit - filling[own].size)
                filling[own].add(place, slot, (start, end))
                start = end
    for bucket in buckets:
        each = [(slots[place].weight, stop - start) for place, runs in bucket.parts.items() for start, stop in runs]
        if any(weight != 1 for weight, _ in each):
            lengths = torch.tensor([length for _, length in each])
            weights = torch.tensor([weight for weight, _ in each], dtype=bucket.dtype)
            bucket.roots = weights.sqrt().repeat_interleave(lengths).to(bucket.device)
        _stretch(bucket, slots, cached if bucket.device.type == "cpu" else _LAUNCHED)
    return buckets


def _stretch(bucket: Bucket, slots: Sequence[Slot], limit: int) -> None:
    """Divide what a bucket gathers, so that no more than about ``limit`` numbers are copied at once."""
    stretches = [Stretch(0, 0)]
    for place, runs in bucket.parts.items():
        if stretches[-1].copied >= limit:
            stretches.append(Stretch(stretches[-1].stop, stretches[-1].stop))
        stretches[-1].add(place, runs, slots[place].numel)
    bucket.stretches = stretches


def are_safe(squares: Iterable[float]) -> bool:
    """Whether numbers with such squared norms may be multiplied in float32."""
    return all(_SMALL < square < _LARGE for square in squares)


def squared_norm(tensor: Tensor) -> Tensor:
    """``‖tensor‖²``, accumulated in the widest dtype of the device, as a 0-dim tensor."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=exact_dtype(tensor.device))
    return norm.square()


class Sums:
    """Sums over buckets by scope. Constants stay on the device, and are made anew only when their numbers change."""

    def __init__(self) -> None:
        self._constants: dict[Hashable, Tensor] = {}

    def constant(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """A vector of these numbers."""
        key = (tuple(numbers), device)
        if key not in self._constants:
            if len(self._constants) >= _CONSTANTS:
                self._constants.clear()
            self._constants[key] = torch.tensor(numbers, dtype=exact_dtype(device), device=device)
        return self._constants[key]

    def by_scope(
        self,
        rows: Sequence[Sequence[Tensor]],
        factors: Sequence[tuple[float, ...]],
        flags: Sequence[tuple[bool, ...]],
        device: torch.device,
        width: int,
    ) -> Tensor:
        """Sum the numbers of the buckets by scope.

        Args:
            rows: The numbers of each bucket, as 0-dim tensors. A process without elements has no bucket.
            factors: The scope of each bucket, and the factors of its numbers.
            flags: Some flags of each scope.
            device: The device for the sums.
            width: How many numbers a bucket has.

        Returns:
            The flags and the sums of each scope, of shape (scopes, flags + width).
        """
        flagged = self.constant([*chain(*flags)], device).view(len(flags), -1)
        if not rows:
            return torch.cat([flagged, flagged.new_zeros(len(flags), width)], dim=1)
        numbers = torch.stack([number.to(device) for row in rows for number in row]).view(-1, width).to(flagged)
        weights = [*chain(*(numbers for _, *numbers in factors))]
        if len(rows) == len(flags) == 1 and all(weight == 1 for weight in weights):  # as in most models
            return torch.cat([flagged, numbers], dim=1)
        places = range(len(flags))
        own = self.constant([scope == place for place in places for scope, *_ in factors], device)
        sums = own.view(len(flags), -1, 1) * self.constant(weights, device).view(-1, width) * numbers
        return torch.cat([flagged, sums.sum(1)], dim=1)
