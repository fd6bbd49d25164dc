"""The memory of ``Displacement``: four rows of numbers for the coordinates of each bucket, which outlive the buckets.

The rows are ``r_t``, ``Ē``, ``g_{t-1}`` and ``θ_{t-1}``. Where parameters come or go, and in a checkpoint, what is
remembered belongs to parameters.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hd.hypergradient.buckets import Bucket
from lightning_hd.hypergradient.probe import Key, Range, Slot
from lightning_hd.processes import Ranks, exact_dtype

ROWS = 4


@dataclass
class Memory:
    """What is remembered of one bucket."""

    rows: Tensor  # of shape (4, n)
    g_squared: Tensor  # ‖g_{t-1}‖²


@dataclass(frozen=True)
class Remembered:
    """What is remembered of one parameter."""

    size: int  # of the parameter
    count: int  # of its coordinates in the probe
    runs: tuple[Range, ...] | None  # the part that this process holds; None: all of the probe
    rows: Tensor  # of shape (4, n)

    def fit(self, slot: Slot) -> Tensor | None:
        """The rows for the coordinates that this process holds; ``None`` if they are of another parameter."""
        if (self.size, self.count) != (slot.size, slot.count):
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
    updated: bool


def by_parameter(
    slots: Sequence[Slot], buckets: Sequence[Bucket], memories: Sequence[Memory | None]
) -> dict[Key, Remembered]:
    """What the buckets remember of each parameter."""
    parts: dict[int, list[Tensor]] = {}
    for bucket, memory in zip(buckets, memories, strict=True):
        if memory is not None:
            for place, part in zip(bucket.parts, torch.split(memory.rows, bucket.lengths, 1), strict=True):
                parts.setdefault(place, []).append(part)
    return {
        slots[place].key: Remembered(slots[place].size, slots[place].count, slots[place].runs, torch.cat(own, 1))
        for place, own in parts.items()
    }


def by_bucket(
    buckets: Sequence[Bucket], theta_of: Callable[[int], Tensor], known: Mapping[int, Tensor], replaced: Set[int]
) -> list[Memory | None]:
    """What the buckets remember; ``None`` where nothing is known.

    Args:
        buckets: The buckets.
        theta_of: The parameters in a bucket, by its number. One that is not known has been where it is.
        known: The rows of the parameters that are known, by the places of their slots.
        replaced: The places of parameters that took the place of others, whose moves are known.
    """
    memories, taken = list[Memory | None](), dict.fromkeys(known, 0)
    for i, bucket in enumerate(buckets):
        if not known.keys() & bucket.parts.keys():
            memories.append(None)
            continue
        theta = _weighted(bucket, theta_of(i))
        rows = torch.stack([theta, torch.zeros_like(theta), torch.zeros_like(theta), theta])
        parts = torch.split(rows, bucket.lengths, 1)
        for place, part, now in zip(bucket.parts, parts, torch.split(theta, bucket.lengths), strict=True):
            if place in known:
                part.copy_(known[place][:, taken[place] : taken[place] + part.shape[1]])
                taken[place] += part.shape[1]
            if place in replaced:
                _follow(part, now)
        memories.append(Memory(rows, torch.dot(rows[2], rows[2])))
    return memories


def follow(buckets: Sequence[Bucket], memories: Sequence[Memory | None], theta_of: Callable[[int], Tensor]) -> None:
    """Keep all moves, and let the means follow the parameters to where they are now."""
    for i, (bucket, memory) in enumerate(zip(buckets, memories, strict=True)):
        if memory is not None:
            _follow(memory.rows, _weighted(bucket, theta_of(i)))


def _weighted(bucket: Bucket, theta: Tensor) -> Tensor:
    return theta if bucket.roots is None else theta * bucket.roots


def _follow(rows: Tensor, now: Tensor) -> None:
    rows[0] += now - rows[3]
    rows[3] = now


def whole(
    slots: Sequence[Slot], own: Mapping[Key, Remembered], updated: set[Key], ranks: Ranks, device: torch.device
) -> tuple[list[Saved], Tensor]:
    """What all processes remember together, one parameter after the other. If they have shards, all must call it."""
    split = ranks.count > 1 and any(isinstance(slot.p, DTensor) or slot.offset is not None for slot in slots)
    parts = []
    for slot in slots:
        rows = own[slot.key].rows if slot.key in own else torch.zeros(ROWS, 0)
        part = torch.zeros(ROWS, slot.count, dtype=exact_dtype(device), device=device)
        if not split:
            part = rows.to(part)
        elif ranks.speaks_for(slot.p) and rows.shape[1]:
            part[:, slot.positions().to(device)] = rows.to(part)
        parts.append(part)
    flags = parts[0].new_tensor([slot.key in updated for slot in slots])
    everything = torch.cat([torch.cat(parts, 1).flatten(), flags])
    everything = (ranks.sum(everything) if split else everything).cpu()
    rows, flags = everything[: -len(slots)].view(ROWS, -1), everything[-len(slots) :]
    rows = torch.where(rows.isfinite(), rows, 0.0)  # a last gradient that is not finite is not looked at again
    saved = [Saved(*slot.key, slot.size, slot.count, bool(flag)) for slot, flag in zip(slots, flags, strict=True)]
    return saved, rows
