"""Moves: where the parameters are, and were on average. The view of rules with a long horizon.

With ``E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1})``, the sum of the moves, ``θ_t - E_t`` is a running mean of the iterates:
``r_{t-1} + (1 - φ_{t-1}) (θ_{t-1} - r_{t-1})``. One vector is kept on the probe, and the optimizer need not be known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_flag
from lightning_hd.notices import Notices
from lightning_hd.optimizers import coupled_decay, device_of
from lightning_hd.probe import Bucket, Key, Range, Slot, gather, look, pack
from lightning_hd.reduction import Ranks, exact_dtype, gradient_of, is_flat_shard, local
from lightning_hd.view import View

_PART = 0.1
"""Where new parameters are this part of a scope, or more, its rate starts anew: it was found without them."""


class Moves(View):
    """The derivative of the loss with respect to the logarithm of the rate that all remembered steps shared.

    Args:
        optimizer: The optimizer.
        budget: How many coordinates to look at; ``None``: all.
        ranks: The processes that train together.
        notices: For what the user should know.
    """

    def __init__(self, optimizer: Optimizer, budget: int | None, ranks: Ranks, notices: Notices) -> None:
        super().__init__(optimizer, budget, ranks, notices)
        self._parameters: list[Tensor] = []
        self._places: list[int] = []  # where the parameters lie in memory
        self._sizes: list[int] = []  # of this process's parts of them
        self._sharded = any(isinstance(p, DTensor) for settings in optimizer.param_groups for p in settings["params"])
        self._buckets: list[Bucket] = []
        self._pieces: list[list[Tensor]] = []  # of the parameters, for each bucket
        self._means: list[Tensor | None] = []  # r, for each bucket
        self._moved: list[Tensor] = []  # E, for each bucket, while a step is under way
        self._saved: dict[Key, Saved] = {}  # of a checkpoint
        self._updated: set[Key] = set()  # parameters that had a gradient in a remembered step
        self._present: set[Key] | None = None  # those that have one now
        self._joined: set[int] = set()  # scopes that many of them have joined in this step
        self._missing: frozenset[int] = frozenset()  # the places of those that have none
        self._apart: set[int] = set()  # groups whose last move did not follow their scope's rate
        self._coming: set[int] = set()  # those of which the move that comes will not

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": []}  # a copy's parameters lie elsewhere

    def observe(self, scopes: Sequence[int], grad_scale: Tensor | None, wide: bool = False) -> Tensor:
        """For each scope ``g·E``, ``‖g‖²``, ``‖E‖²`` and two flags; see ``View.observe``."""
        self._prepare(scopes)
        missing = frozenset(i for i, p in enumerate(self._parameters) if p.grad is None)
        flats = [
            slot.flat(slot.p.detach() if place in missing else gradient_of(slot.p))
            for place, slot in enumerate(self.slots)
        ]
        sums = []
        self._moved = []
        for bucket, pieces, mean in zip(self._buckets, self._pieces, self._means, strict=True):
            theta = gather(pieces or bucket.views(self._flats()))
            theta = theta.to(exact_dtype(bucket.device), copy=True)
            g = self._gradient(bucket, gather(bucket.views(flats)), theta, grad_scale)
            if bucket.roots is not None:  # so that sums over the probe are unbiased estimates of those over everything
                g, theta = g.mul_(bucket.roots), theta.mul_(bucket.roots)
            moved = theta if mean is None else theta.sub_(mean)
            self._moved.append(moved)
            if mean is None:
                moved = torch.zeros_like(theta)
            for start, stop in self._spans_apart(bucket):
                moved = moved.clone()
                moved[start:stop] = 0
            if missing & bucket.parts.keys():
                mask = self._mask(bucket, missing)
                g, moved = g * mask, moved * mask
            sums.append(torch.stack([torch.dot(g, moved), torch.dot(g, g), torch.dot(moved, moved)]))
        if self._present is None or missing != self._missing:
            self._missing = missing
            self._present = {slot.key for place, slot in enumerate(self.slots) if place not in missing}
            self._joined = self._joining(scopes)
        known = {i for i, _ in self._present & self._updated}
        shares = [(bucket.key, *[1 / bucket.copies] * 3) for bucket in self._buckets]
        return self._combine(sums, shares, scopes, {i for i, _ in self._present}, known, self._joined)

    def _joining(self, scopes: Sequence[int]) -> set[int]:
        """Scopes of which a part to be reckoned with has a gradient for the first time, and others had one before."""
        sizes: dict[int, list[int]] = {}  # of all, and of those that are new
        for slot in self.slots:
            if self._present and slot.key in self._present:
                own = sizes.setdefault(scopes[slot.group], [0, 0])
                own[0] += slot.size
                own[1] += slot.size * (slot.key not in self._updated)
        known = {scopes[group] for group, _ in self._updated}
        return {scope for scope, (size, new) in sizes.items() if _PART * size <= new and scope in known}

    def forget(self, scope: int) -> None:
        """``E`` is zero, and the mean begins where the parameters are."""
        for i, (bucket, mean) in enumerate(zip(self._buckets, self._means, strict=True)):
            if bucket.key == scope and mean is not None:
                self._moved[i].add_(mean)
                self._means[i] = None

    def keep(self, group: int, lr: float, weight: float) -> None:
        """See which groups do not follow their scopes' rates: the moves that they make now are not counted."""
        if not weight:
            self._coming.add(group)

    def remember(self, kept: Sequence[float | None]) -> None:
        """The step was taken: count the move before it in; where numbers were not finite, the memory stays."""
        for i, (bucket, moved) in enumerate(zip(self._buckets, self._moved, strict=True)):
            part, mean = kept[bucket.key], self._means[i]
            if mean is None and part is not None:
                self._means[i] = moved
            elif mean is not None and part is not None:
                mean.add_(moved, alpha=1 - part)
                for start, stop in self._spans_apart(bucket):  # nothing is left of E
                    mean[start:stop].add_(moved[start:stop], alpha=part)
        self._apart, self._coming = self._coming, set()
        self._updated |= self._present or set()
        self._joined = set()
        self._moved = []

    def abandon(self) -> None:
        """The step was not taken."""
        self._moved, self._coming = [], set()

    def pause(self) -> None:
        """What moves the parameters in between is a move as any other."""

    def make_room(self) -> None:
        """Nothing is saved with the optimizer."""

    def _spans_apart(self, bucket: Bucket) -> list[Range]:
        return [bucket.spans[group] for group in self._apart & bucket.spans.keys()]

    def _gradient(self, bucket: Bucket, g: Tensor, theta: Tensor, grad_scale: Tensor | None) -> Tensor:
        """``g_t``: that of the objective which the optimizer minimizes."""
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
        """1 where a parameter has a gradient, else 0."""
        flags = self._tables.constant([float(place not in missing) for place in bucket.parts], bucket.device)
        lengths = self._tables.constant(bucket.lengths, bucket.device).long()
        return flags.repeat_interleave(lengths, output_size=bucket.size)  # with the size known, nothing waits for it

    # ------------------------------------------------------------------ which parameters there are

    def _prepare(self, scopes: Sequence[int]) -> None:
        """See whether parameters came, went, or lie somewhere else now."""
        groups = self._optimizer.param_groups
        parameters = [p for settings in groups for p in settings["params"] if p.requires_grad]
        tensors = [local(p) for p in parameters] if self._sharded else parameters
        places = list(map(Tensor.data_ptr, tensors))
        sizes = list(map(Tensor.numel, tensors))
        if self.slots and sizes == self._sizes and list(map(id, parameters)) == list(map(id, self._parameters)):
            if places != self._places:
                self._places, self._pieces = places, self._views()
            return
        before = self._local_means()
        self._parameters, self._places, self._sizes, self._present = parameters, places, sizes, None
        found = [(i, j, p) for i, own in enumerate(groups) for j, p in enumerate(own["params"]) if p.requires_grad]
        self.slots = look(found, self._budget, self._ranks, flat_offsets(parameters, self._ranks))
        self._buckets = pack(self.slots, lambda slot: scopes[slot.group])
        self._pieces = self._views()
        self._means = self._carried(before)
        self._saved = {}

    def _flats(self) -> list[Tensor]:
        return [slot.flat(slot.p.detach()) for slot in self.slots]

    def _views(self) -> list[list[Tensor]]:
        """Of the parameters, to be gathered from in every step; of a bucket with copies among them none."""
        flats = self._flats()
        still = [flat.data_ptr() == local(slot.p).data_ptr() for flat, slot in zip(flats, self.slots, strict=True)]
        return [bucket.views(flats) if all(still[place] for place in bucket.parts) else [] for bucket in self._buckets]

    # ------------------------------------------------------------------ what was remembered

    def _local_means(self) -> dict[Key, tuple[Slot, Tensor]]:
        """This process's part of ``r`` for each parameter."""
        parts: dict[int, list[Tensor]] = {}
        for bucket, mean in zip(self._buckets, self._means, strict=True):
            for place, part in zip(bucket.parts, torch.split(mean, bucket.lengths) if mean is not None else ()):  # noqa: B905
                parts.setdefault(place, []).append(part)
        slots = [self.slots[place] for place in parts]
        return {slot.key: (slot, torch.cat(tensors)) for slot, tensors in zip(slots, parts.values(), strict=True)}

    def _carried(self, before: Mapping[Key, tuple[Slot, Tensor]]) -> list[Tensor | None]:
        """``r`` for the present buckets, from that of the former ones, or of a checkpoint; else the parameters."""
        known: dict[int, Tensor] = {}
        for place, slot in enumerate(self.slots):
            former, saved = before.get(slot.key), self._saved.get(slot.key)
            if former is not None and (former[0].size, former[0].runs) == (slot.size, slot.runs):
                known[place] = former[1]
            elif saved is not None and (saved.size, saved.count) == (slot.size, slot.count):
                known[place] = saved.mean[slot.positions()]
        self._updated &= {self.slots[place].key for place in known}
        if not known:
            if before or self._saved:
                self._notices.warn(
                    "lost moves", "what is remembered is of other parameters; the memory of former steps starts anew"
                )
            return [None] * len(self._buckets)
        means: list[Tensor | None] = []
        taken = dict.fromkeys(known, 0)
        for bucket in self._buckets:
            mean = gather(bucket.views(self._flats())).to(exact_dtype(bucket.device), copy=True)
            mean = mean if bucket.roots is None else mean.mul_(bucket.roots)
            for place, part in zip(bucket.parts, torch.split(mean, bucket.lengths), strict=True):
                if place in known:
                    part.copy_(known[place][taken[place] : taken[place] + len(part)])
                    taken[place] += len(part)
            means.append(mean)
        return means

    def state_dict(self) -> dict[str, Any]:
        """``r`` in the coordinates of the whole parameters, times the roots of their weights.

        Where parameters are sharded, it is to be called on every process.
        """
        if not self.slots or all(mean is None for mean in self._means):
            wholes = [saved.mean for saved in self._saved.values()]
            entries = [[*key, saved.size, saved.count, saved.updated] for key, saved in self._saved.items()]
            mean = torch.cat(wholes) if wholes else torch.zeros(0)
            return {"parameters": entries, "mean": mean, "apart": sorted(self._apart)}
        own, device = self._local_means(), device_of(self._optimizer)
        sharded = self._ranks.count > 1 and any(
            isinstance(slot.p, DTensor) or slot.offset is not None for slot in self.slots
        )
        wholes = []
        for slot in self.slots:
            _, part = own.get(slot.key, (slot, torch.zeros(0)))
            whole = torch.zeros(slot.count, dtype=exact_dtype(device), device=device)
            if not sharded:
                whole = part.to(whole)
            elif self._ranks.speaks_for(slot.p) and len(part):
                whole[slot.positions().to(whole.device)] = part.to(whole)
            wholes.append(whole)
        updated = wholes[0].new_tensor([slot.key in self._updated for slot in self.slots])
        everything = torch.cat([*wholes, updated])
        everything = (self._ranks.sum(everything) if sharded else everything).cpu()
        mean, updated = everything[: -len(self.slots)], everything[-len(self.slots) :]
        return {
            "parameters": [
                [*slot.key, slot.size, slot.count, bool(flag)] for slot, flag in zip(self.slots, updated, strict=True)
            ],
            "mean": mean.clone(),
            "apart": sorted(self._apart),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, in the next step.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
        """
        entries = [
            ([check_count("parameters", number) for number in numbers], check_flag("parameters", updated))
            for *numbers, updated in state_dict["parameters"]
        ]
        apart = {check_count("apart", group) for group in state_dict["apart"]}
        counts, mean = [count for (_, _, _, count), _ in entries], state_dict["mean"]
        if not isinstance(mean, Tensor) or mean.shape != (sum(counts),) or not bool(mean.isfinite().all()):
            raise ValueError(f"mean must be {sum(counts)} finite numbers")
        self._parameters, self.slots, self._buckets, self._means = [], [], [], []
        self._apart, self._coming = apart, set()
        parts = torch.split(mean, counts) if counts else ()
        self._saved = {
            (i, j): Saved(size, count, updated, part)
            for ((i, j, size, count), updated), part in zip(entries, parts, strict=True)
        }
        self._updated = {key for key, saved in self._saved.items() if saved.updated}


@dataclass
class Saved:
    """What a checkpoint has of one parameter: its size, how many coordinates are looked at, and ``r`` at those."""

    size: int
    count: int
    updated: bool
    mean: Tensor


def flat_offsets(parameters: Sequence[Tensor], ranks: Ranks) -> dict[Tensor, Range]:
    """For parameters that are flat shards, where this process's part begins, and the size of the whole.

    Raises:
        TypeError: Several processes hold the same elements, which cannot be told from shards.
    """
    flat = [p for p in parameters if is_flat_shard(p)]
    if not flat:
        return {}
    content = sum(float(p.detach().double().sum()) for p in flat)
    everyone = ranks.gather(([p.numel() for p in flat], content))
    holding = [other for other in everyone if any(other[0])]
    if any(a == b for i, a in enumerate(holding) for b in holding[:i]):
        raise TypeError(
            "several processes hold the same part of the flat parameters (ShardingStrategy.NO_SHARD or HYBRID_SHARD), "
            "which is not supported: use FULL_SHARD or SHARD_GRAD_OP, or torch.distributed.fsdp.fully_shard"
        )
    table = torch.tensor([sizes for sizes, _ in everyone])
    before, whole = table[: ranks.rank].sum(0).tolist(), table.sum(0).tolist()
    return dict(zip(flat, zip(before, whole, strict=True), strict=True))
