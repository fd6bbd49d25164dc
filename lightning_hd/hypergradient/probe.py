"""The probe: which coordinates of the parameters are looked at.

Coordinates are those of the whole parameter, whatever part of it a process holds. So they are the same on any number of
processes. They are chosen by a fixed seed, in contiguous blocks that are spread evenly over each parameter.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hd.processes import Ranks, as_real, local

PROBE = 2**16
"""The number of coordinates of a probe by default. With four times as many, the mean loss over the benchmark is the
same within 0.1 %; with fewer than some thousands, it is not."""

_BLOCK = 2**12
"""The number of coordinates in a block. Its size is some kilobytes, so that reads of the memory are few and long."""

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
        replicas: The number of processes that hold the same elements.
        order: The dimensions by descending stride; ``None``: the parameter lies in memory row by row.
        offset: For a flat shard, its offset in the whole and the size of the whole; else ``None``.
    """

    group: int
    index: int
    p: Tensor
    size: int
    blocks: tuple[Range, ...]
    runs: tuple[Range, ...]
    replicas: float
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
    def dtype(self) -> torch.dtype:
        """The dtype in which its numbers are looked at: its own, float32 at least."""
        return torch.promote_types(as_real(local(self.p.detach())).dtype, torch.float32)

    @cached_property
    def is_plain(self) -> bool:
        """Whether its tensors are real, whole, and lie in memory row by row."""
        return self.order is None and not isinstance(self.p, DTensor) and not self.p.is_complex()

    def positions(self) -> Tensor:
        """For each number of ``runs``, its place among the parameter's coordinates in the probe."""
        own = coordinates(self.p, self.offset)
        ids = torch.cat([own[start:stop] for start, stop in self.runs]) if self.runs else own[:0]
        starts = torch.tensor([start for start, _ in self.blocks], dtype=torch.int64)
        before = torch.tensor([0, *(stop - start for start, stop in self.blocks)]).cumsum(0)
        block = torch.searchsorted(starts, ids, right=True) - 1
        return before[block] + ids - starts[block]


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
        slots.append(Slot(group, index, p, size, blocks, runs, ranks.replicas(p), order, offsets.get(p)))
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
