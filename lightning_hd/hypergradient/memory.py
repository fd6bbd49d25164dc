"""The memory of ``Displacement``: four rows of numbers for the coordinates of each bucket, which outlive the buckets.

The rows are ``E_t``, ``Ē``, ``g_{t-1}`` and ``θ_{t-1}``. Where parameters come or go, and in a checkpoint, what is
remembered belongs to parameters.
"""

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hd.hypergradient.buckets import ROWS, Bucket, Memory
from lightning_hd.hypergradient.probe import Key, Range, Slot
from lightning_hd.processes import Ranks


@dataclass(frozen=True)
class Remembered:
    """What is remembered of one parameter."""

    size: int  # of the parameter
    count: int  # of its coordinates in the probe
    runs: tuple[Range, ...] | None  # the part that this process holds; None: all of the probe
    rows: Tensor  # of shape (4, n)
    order: Sequence[float]  # of the dimensions in memory; see ``Saved``

    def fit(self, slot: Slot) -> Tensor | None:
        """The rows for the coordinates that this process holds; ``None`` if they are of another parameter."""
        if (self.size, self.count, *self.order) != (slot.size, slot.count, *(slot.order or ())):
            return None
        if self.runs is None:
            return self.rows[:, slot.positions()]
        return self.rows if self.runs == slot.runs else None


@dataclass
class Saved:
    """How a checkpoint describes a parameter."""

    group: int
    index: int
    size: int
    count: int
    updated: bool  # whether it had a gradient in a remembered step
    known: bool  # whether anything is remembered of it
    order: list[float]  # the dimensions by descending stride, if that is not their own order

    @property
    def key(self) -> Key:
        """The group and the place of the parameter."""
        return self.group, self.index


def by_key(saved: Sequence[Saved], rows: Tensor) -> dict[Key, Remembered]:
    """What a checkpoint has of each parameter of which anything is known."""
    parts = torch.split(rows, [own.count for own in saved], 1) if saved else ()
    both = zip(saved, parts, strict=True)
    return {own.key: Remembered(own.size, own.count, None, part, own.order) for own, part in both if own.known}


def by_parameter(slots: Sequence[Slot], buckets: Sequence[Bucket], memories: Sequence[Memory]) -> dict[Key, Remembered]:
    """What the buckets remember of each parameter."""
    parts: dict[int, list[Tensor]] = {}
    for bucket, memory in zip(buckets, memories, strict=True):
        if memory.known:
            split = torch.split(torch.stack(memory.rows), bucket.lengths, 1)
            for place, part in zip(bucket.parts, split, strict=True):
                parts.setdefault(place, []).append(part)
    remembered = {}
    for place, own in parts.items():
        slot = slots[place]
        remembered[slot.key] = Remembered(slot.size, slot.count, slot.runs, torch.cat(own, 1), slot.order or ())
    return remembered


def by_bucket(
    buckets: Sequence[Bucket], memories: Sequence[Memory], known: Mapping[int, Tensor], replaced: Set[int]
) -> None:
    """Let the buckets remember what is known.

    Args:
        buckets: The buckets.
        memories: Their memories, which have the present parameters. One that is not known has been where it is.
        known: The rows of the parameters that are known, by the places of their slots.
        replaced: The places of parameters that took the place of others, whose moves are known.
    """
    taken = dict.fromkeys(known, 0)
    for bucket, memory in zip(buckets, memories, strict=True):
        memory.known = bool(known.keys() & bucket.parts.keys())
        start = 0
        for place, length in zip(bucket.parts, bucket.lengths, strict=True):
            begin, rows = taken.get(place, 0), known.get(place)
            if rows is not None:
                for own, row in zip(memory.rows, rows[:, begin : begin + length], strict=True):
                    own[start : start + length] = row
                taken[place] = begin + length
            if place in replaced:
                memory.last.theta[start : start + length] = memory.now.theta[start : start + length]
            start += length


def whole(
    slots: Sequence[Slot], own: Mapping[Key, Remembered], updated: set[Key], ranks: Ranks, device: torch.device
) -> tuple[list[Saved], Tensor]:
    """What all processes remember together, one parameter after the other. If they have shards, all must call it."""
    split = ranks.count > 1 and any(isinstance(slot.p, DTensor) or slot.offset is not None for slot in slots)
    parts, dtype = [], functools.reduce(torch.promote_types, (slot.dtype for slot in slots))
    for slot in slots:
        part, was = torch.zeros(ROWS, slot.count, dtype=dtype, device=device), own.get(slot.key)
        if was is not None and not split:
            part = was.rows.to(part)
        elif was is not None and ranks.speaks_for(slot.p):
            part[:, slot.positions().to(device)] = was.rows.to(part)
        parts.append(part)
    flags = parts[0].new_tensor([(slot.key in updated, slot.key in own) for slot in slots]).flatten()
    everything = torch.cat([torch.cat(parts, 1).flatten(), flags])
    everything = (ranks.sum(everything) if split else everything).cpu()
    rows, flags = everything[: -len(flags)].view(ROWS, -1), everything[-len(flags) :]
    rows = torch.where(rows.isfinite(), rows, 0.0)  # a last gradient that is not finite is not looked at again
    found = flags.view(-1, 2).bool().tolist()
    saved = [
        Saved(*slot.key, slot.size, slot.count, had, known, [*map(float, slot.order or ())])
        for slot, (had, known) in zip(slots, found, strict=True)
    ]
    return saved, rows
