"""The processes that train together, each with a replica or a shard: sums over them, and what the first one says."""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

_log = logging.getLogger("lightning_hd")


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real one of twice the size, as optimizers see it; any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widen(tensor: Tensor) -> Tensor:
    """A tensor of less than 32 bits per element in float32; any other tensor as it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of a device, in which sums are accumulated."""
    return torch.float32 if device.type == "mps" else torch.float64


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, which may be empty; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(p: Tensor) -> Tensor:
    """The gradient of a parameter that has one, sharded as the parameter is."""
    g = p.grad
    assert g is not None, "the caller passes parameters with a gradient only"
    if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return g


def is_flat_shard(p: Tensor) -> bool:
    """Whether a parameter is a slice of a flat one (``FullyShardedDataParallel`` with ``use_orig_params=True``).

    torch marks such parameters by this attribute. It has no public name for it.
    """
    return getattr(p, "_fsdp_flattened", False) and not isinstance(p, DTensor)


class Sum:
    """Numbers that are on their way to the host, which need not wait for them.

    Args:
        tensor: The numbers, on the device.
        work: The collective that is still to end; ``None``: there is none.
    """

    def __init__(self, tensor: Tensor, work: "dist.Work | None" = None) -> None:
        self._tensor = tensor
        self._work = work
        self._copied: torch.cuda.Event | None = None
        self._numbers: list[float] | None = None

    def fetch(self) -> None:
        """Begin to copy the numbers to the host, which reads them later."""
        if self._tensor.is_cuda:
            if self._work is not None:
                self._work.wait()  # the stream waits, the host does not
            host = torch.empty_like(self._tensor, device="cpu", pin_memory=True)
            self._tensor = host.copy_(self._tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._copied.record()

    def read(self) -> list[float]:
        """The numbers. It waits until they are there."""
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            elif self._work is not None:
                self._work.wait()
            self._numbers = self._tensor.tolist()
        return self._numbers

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sum":
        return Sum(torch.tensor(self.read(), dtype=self._tensor.dtype))


class Ranks:
    """The processes that train together: those of a process group, or this one alone.

    Args:
        group: The process group; ``None``: the default one, once ``torch.distributed`` is initialized.

    Raises:
        TypeError: ``group`` is not a process group.
        ValueError: This process is not in it.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, ProcessGroup):
            if type(group) is type(dist.GroupMember.NON_GROUP_MEMBER) and group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("process_group: this process is not in it")
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
        self._group = group

    @property
    def count(self) -> int:
        """The number of processes."""
        return dist.get_world_size(self._group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The rank of this process among them."""
        return dist.get_rank(self._group) if self.count > 1 else 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all of them."""
        return self.rank == 0

    def replicas(self, p: Tensor) -> float:
        """The number of ranks that hold the same elements of a parameter."""
        if is_flat_shard(p):
            return 1.0
        if not isinstance(p, DTensor):
            return float(self.count)
        mesh = p.device_mesh
        shards = math.prod(mesh.size(i) for i, placement in enumerate(p.placements) if not placement.is_replicate())
        return self.count / shards

    def speaks_for(self, p: Tensor) -> bool:
        """Whether this process is the first of those that hold the same elements of a parameter."""
        if is_flat_shard(p):
            return True
        if not isinstance(p, DTensor):
            return self.is_first
        place = p.device_mesh.get_coordinate()
        return place is not None and not any(
            index for index, placement in zip(place, p.placements, strict=True) if placement.is_replicate()
        )

    def check_meshes(self, parameters: Iterable[Tensor]) -> None:
        """Raise ``ValueError`` if a parameter has shards or copies on other processes than these."""
        meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
        for mesh in meshes if self._group is not None else ():
            missing = set(mesh.mesh.flatten().tolist()) - set(dist.get_process_group_ranks(self._group))
            if missing:
                raise ValueError(
                    f"process_group lacks the ranks {sorted(missing)}, which hold shards of the parameters as well: "
                    "give all processes that train the model together"
                )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, equal on all of them bit for bit. It takes one collective, or none for one rank."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Sum:
        """Begin to sum a tensor over all ranks, in place. The sums are equal on all of them bit for bit."""
        return Sum(tensor, dist.all_reduce(tensor, group=self._group, async_op=True) if self.count > 1 else None)

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of each rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def check_agreement(self, owner: str, step: int, lrs: Sequence[float]) -> None:
        """Raise ``RuntimeError`` on every rank if not all are at the same step and the same rates."""
        everyone = self.gather((step, lrs))
        if any(other != everyone[0] for other in everyone):
            held = "; ".join(f"rank {rank}: step {step}, {lrs}" for rank, (step, lrs) in enumerate(everyone))
            raise RuntimeError(
                f"{owner}: the learning rates of the processes differ ({held}). Something has set them on some "
                "processes only: a rate that was written there, a scheduler that is stepped by a metric of its own "
                "process (log it with sync_dist=True), or a step that was left out"
            )


class Notices:
    """Warnings, one of each kind, and log messages about one optimizer, from the first process.

    Args:
        owner: The class that users have written.
        name: The name of the optimizer. Messages begin with both.
        ranks: The processes.
    """

    def __init__(self, owner: str, name: str, ranks: Ranks) -> None:
        self.owner = owner
        self.name = f"{owner}({name})"
        self._ranks = ranks
        self._given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless there was a warning of that kind before."""
        if kind not in self._given and self._ranks.is_first:
            warnings.warn(f"{self.name}: {message}", RuntimeWarning, stacklevel=3)
        self._given.add(kind)

    def log(self, message: str) -> None:
        """Write a message to the log."""
        if self._ranks.is_first:
            _log.info("%s: %s", self.name, message)


def flat_offsets(parameters: Sequence[Tensor], ranks: Ranks) -> dict[Tensor, tuple[int, int]]:
    """For each parameter that is a flat shard, the offset of this process's part and the size of the whole.

    Raises:
        TypeError: Several processes hold the same elements.
    """
    flat = [p for p in parameters if is_flat_shard(p)]
    if not flat:
        return {}
    numbers = [*flat, *(p.grad for p in flat if p.grad is not None)]  # weights alone may all be 0
    content = [float(number.detach().double().sum()) for number in numbers]
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
