"""The probe: which coordinates of the parameters are looked at, and how they are gathered into flat vectors.

Coordinates are those of the whole parameter, whatever part of it a process holds. So they are the same on any number of
processes. They are chosen by a fixed seed, in contiguous blocks that are spread evenly over each parameter.
"""

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hd.processes import Ranks, as_real, exact_dtype, local

PROBE = 2**18
"""The number of coordinates of a probe by default. More do not change what is learned; fewer than some thousands do."""

_BLOCK = 2**12
"""The number of coordinates in a block. Its size is some kilobytes, so that reads of the memory are few and long."""

_CACHED, _LAUNCHED = 2**20, 2**24
"""The numbers of coordinates in a bucket. On a CPU it should stay in the cache, elsewhere launches should be few."""

Range = tuple[int, int]
Key = tuple[int, int]
"""A parameter: its group, and its place in that."""


@dataclass(frozen=True)
class Slot:
    """One parameter as the probe sees it on this process.

    Args:
        group: The index of its parameter group.
        index: Its place in the group.
        p: The parameter.
        size: The number of its real coordinates, over all processes.
        blocks: The coordinates to look at, in ascending order.
        runs: The places of these coordinates in the part that this process holds.
        copies: The number of processes that hold the same elements.
        order: The dimensions by descending stride; ``None``: the parameter lies in memory row by row.
        offset: For a flat shard, its offset in the whole and the size of the whole; else ``None``.
    """

    group: int
    index: int
    p: Tensor
    size: int
    blocks: tuple[Range, ...]
    runs: tuple[Range, ...]
    copies: float
    order: tuple[int, ...] | None
    offset: Range | None

    @cached_property
    def key(self) -> Key:
        """The group and the place of the parameter."""
        return self.group, self.index

    @property
    def weight(self) -> float:
        """The number of coordinates for which each one of the probe stands."""
        return self.size / self.count

    @cached_property
    def count(self) -> int:
        """The number of its coordinates in the probe, over all processes."""
        return sum(stop - start for start, stop in self.blocks)

    @cached_property
    def numel(self) -> int:
        """How many real coordinates this process holds."""
        return as_real(local(self.p.detach())).numel()

    @cached_property
    def is_plain(self) -> bool:
        """Whether its tensors are real, whole, and lie in memory row by row."""
        return self.order is None and not isinstance(self.p, DTensor) and not self.p.is_complex()

    def flat(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor of the parameter's shape, in one dimension: a view if possible."""
        if self.is_plain:
            return tensor.reshape(-1)
        tensor = as_real(local(tensor))
        return (tensor if self.order is None else tensor.permute(self.order)).reshape(-1)

    def positions(self) -> Tensor:
        """For each number of ``runs``, its place among the parameter's coordinates in the probe."""
        own = coordinates(self.p, self.offset)
        ids = torch.cat([own[start:stop] for start, stop in self.runs]) if self.runs else own[:0]
        starts = torch.tensor([start for start, _ in self.blocks], dtype=torch.int64)
        before = torch.tensor([0, *(stop - start for start, stop in self.blocks)]).cumsum(0)
        block = torch.searchsorted(starts, ids, right=True) - 1
        return before[block] + ids - starts[block]


@dataclass
class Bucket:
    """Coordinates of several parameters, gathered into one flat vector.

    Args:
        key: What the parameters have in common.
        device: The device of the parameters.
        copies: The number of processes that hold the same elements.
        size: The number of coordinates.
        parts: For each parameter, the place of its slot and the ranges in this process's part of it.
        wholes: The places of the parameters of which the bucket has all that this process holds.
        spans: The range of the coordinates of each parameter group.
        roots: The square roots of the weights; ``None``: all are 1.
    """

    key: Any
    device: torch.device
    copies: float
    size: int = 0
    parts: dict[int, list[Range]] = field(default_factory=dict)
    wholes: set[int] = field(default_factory=set)
    spans: dict[int, Range] = field(default_factory=dict)
    roots: Tensor | None = None

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
        if run == (0, slot.numel):
            self.wholes.add(place)
        begin, _ = self.spans.get(slot.group, (self.size, 0))
        self.size += run[1] - run[0]
        self.spans[slot.group] = (begin, self.size)

    def views(self, flats: Sequence[Tensor] | Mapping[int, Tensor]) -> list[Tensor]:
        """The pieces of the bucket, as views of the flat tensors of all slots."""
        if len(self.wholes) == len(self.parts):
            return [flats[place] for place in self.parts]
        pieces: list[Tensor] = []
        for place, start, stop, sizes in self.cuts:
            if sizes is not None:
                pieces += flats[place][:stop].split_with_sizes(sizes)[1::2]
            else:
                pieces.append(flats[place] if place in self.wholes else flats[place][start:stop])
        return pieces

    @cached_property
    def cuts(self) -> list[tuple[int, int, int, list[int] | None]]:
        """For each parameter the place of its slot, where its pieces begin and end, and the sizes in between."""
        cuts: list[tuple[int, int, int, list[int] | None]] = []
        for place, runs in self.parts.items():
            ends = [0, *(end for run in runs for end in run)]
            sizes = None if len(runs) == 1 else [b - a for a, b in pairwise(ends)]
            cuts.append((place, runs[0][0], runs[-1][1], sizes))
        return cuts


def look(
    parameters: Sequence[tuple[int, int, Tensor]], budget: int | None, ranks: Ranks, offsets: dict[Tensor, Range]
) -> list[Slot]:
    """Choose the coordinates.

    Args:
        parameters: The group, the place and the tensor of each parameter.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes.
        offsets: For each parameter that is a flat shard, the offset of this process's part and the size of the whole.
    """
    sizes = [_size(p, offsets) for _, _, p in parameters]
    slots = []
    for (group, index, p), size, count in zip(parameters, sizes, allot(sizes, budget), strict=True):
        blocks = choose(size, count, f"{group}.{index}")
        runs = _runs(p, blocks, offsets.get(p))
        order = _order(as_real(local(p)))
        slots.append(Slot(group, index, p, size, blocks, runs, ranks.copies(p), order, offsets.get(p)))
    return slots


def allot(sizes: Sequence[int], budget: int | None) -> list[int]:
    """How many coordinates of each parameter to look at.

    Half of the budget goes evenly to all parameters, so that small ones are looked at as a whole. The other half goes
    to them in proportion to their sizes, so that most of it goes to where most of the coordinates are.
    """
    total = sum(sizes)
    if budget is None or total <= budget:
        return list(sizes)
    share = budget / (2 * total)
    low, high = 0.0, float(max(sizes))
    for _ in range(64):
        middle = (low + high) / 2
        fits = sum(min(size, middle + share * size) for size in sizes) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return [min(size, max(1, int(low + share * size))) for size in sizes]


def choose(size: int, count: int, seed: str) -> tuple[Range, ...]:
    """Blocks with ``count`` of ``size`` coordinates. There is one at a random place in each of as many equal parts."""
    if count >= size:
        return ((0, size),) if size else ()
    generator = random.Random(f"{seed} {size} {count}")  # a string gives the same numbers everywhere
    parts = math.ceil(count / _BLOCK)
    blocks = []
    for i in range(parts):
        low, high = size * i // parts, size * (i + 1) // parts
        length = min(count * (i + 1) // parts - count * i // parts, high - low)
        start = low + int(generator.random() * (high - low - length + 1))
        blocks.append((start, start + length))
    return tuple(blocks)


def pack(slots: Sequence[Slot], key: Callable[[Slot], Hashable]) -> list[Bucket]:
    """Pack slots, in the order of their groups, into buckets for one key, device and number of copies each."""
    buckets: list[Bucket] = []
    filling: dict[Hashable, Bucket] = {}
    for place, slot in enumerate(slots):
        device = local(slot.p).device
        limit = _CACHED if device.type == "cpu" else _LAUNCHED
        kind = (key(slot), device, slot.copies)
        for start, stop in slot.runs:
            while start < stop:
                if kind not in filling or filling[kind].size == limit:
                    filling[kind] = Bucket(*kind)
                    buckets.append(filling[kind])
                end = min(stop, start + limit - filling[kind].size)
                filling[kind].add(place, slot, (start, end))
                start = end
    for bucket in buckets:
        each = [(slots[place].weight, stop - start) for place, runs in bucket.parts.items() for start, stop in runs]
        if any(weight != 1 for weight, _ in each):
            lengths = torch.tensor([length for _, length in each])
            weights = torch.tensor([weight for weight, _ in each], dtype=exact_dtype(bucket.device))
            bucket.roots = weights.sqrt().repeat_interleave(lengths).to(bucket.device)
    return buckets


def gather(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces of a bucket as one vector; a view if there is only one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _size(p: Tensor, offsets: Mapping[Tensor, Range]) -> int:
    """The number of real coordinates of the whole parameter."""
    return offsets[p][1] if p in offsets else p.numel() * (2 if p.is_complex() else 1)


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions by descending stride; ``None`` if that is their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))


def _runs(p: Tensor, blocks: Sequence[Range], offset: Range | None) -> tuple[Range, ...]:
    """The places of the blocks in this process's part of a parameter."""
    own = _range(p, offset)
    if own is not None:
        low, high = own
        cut = [(max(start, low) - low, min(stop, high) - low) for start, stop in blocks]
        return tuple((start, stop) for start, stop in cut if start < stop)
    ids = coordinates(p, offset)
    if blocks == ((0, _size(p, {})),):
        return ((0, len(ids)),) if len(ids) else ()
    starts, stops = torch.tensor(blocks, dtype=torch.int64).view(-1, 2).T.contiguous()
    block = torch.searchsorted(starts, ids, right=True) - 1
    places = torch.nonzero((block >= 0) & (ids < stops[block.clamp(min=0)])).flatten().tolist()
    breaks = [i for i, (a, b) in enumerate(pairwise(places), start=1) if b != a + 1]
    edges = [0, *breaks, len(places)] if places else []
    return tuple((places[a], places[b - 1] + 1) for a, b in pairwise(edges))


def _chunk(p: DTensor) -> tuple[list[int], list[int], list[int]]:
    """The shape of a sharded parameter, and the offsets and the sizes of this process's part of it, as real numbers."""
    # torch.distributed.checkpoint calls this method of every sharded tensor; it has no types.
    (chunk,) = p.__create_chunk_list__()  # type: ignore[no-untyped-call]
    tail = [2] if p.is_complex() else []
    return [*p.shape, *tail], [*chunk.offsets, *([0] if tail else [])], [*chunk.sizes, *tail]


def _range(p: Tensor, offset: Range | None) -> Range | None:
    """The coordinates that this process holds; ``None`` if they are not one range."""
    if offset is not None:
        return offset[0], offset[0] + p.numel()
    if not isinstance(p, DTensor):
        return 0, _size(p, {})
    shape, offsets, sizes = _chunk(p)
    if not math.prod(sizes):
        return 0, 0
    cut = [i for i, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    if cut and any(size != 1 for size in sizes[: cut[-1]]):
        return None
    start = sum(at * math.prod(shape[i + 1 :]) for i, at in enumerate(offsets))
    return start, start + math.prod(sizes)


def coordinates(p: Tensor, offset: Range | None) -> Tensor:
    """The coordinate of each number that this process holds, in the order of memory if that is row by row."""
    own = _range(p, offset)
    if own is not None:
        return torch.arange(*own)
    assert isinstance(p, DTensor)
    shape, offsets, sizes = _chunk(p)
    ids = torch.zeros((), dtype=torch.int64)
    for i, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
        ids = ids.unsqueeze(-1) + (at + torch.arange(size)) * math.prod(shape[i + 1 :])
    return ids.flatten()
