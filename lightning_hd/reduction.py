"""Dot products and norms over the tensors of a model, with enough digits for every dtype, over all ranks and shards."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

_PIECE = 2**20
"""Elements whose products are held at a time. ``torch.dot`` would hold none, but on CPU it adds float32 numbers one
after the other, which is off by 3 % for 1e8 of them."""


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real one of twice the size that the optimizers see; any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widen(tensor: Tensor) -> Tensor:
    """A tensor of less than 32 bits an element in float32; any other tensor as it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, which may be empty; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(tensor: Tensor) -> int:
    """Into how many parts a tensor is split: the ranks of its mesh's other dimensions hold copies of them."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate())


class Ranks:
    """The processes that train together: those of a process group, or this one alone.

    Args:
        group: ``None``: the default process group, once ``torch.distributed`` is initialized.

    Raises:
        TypeError: It is no process group.
        ValueError: This process is not in it.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, ProcessGroup):
            if group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("process_group: this process is not in it")
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
        self._group = group

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self._group) if dist.is_initialized() else 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all of them."""
        return self.count == 1 or dist.get_rank(self._group) == 0

    def check_meshes(self, parameters: Iterable[Tensor]) -> None:
        """Raise :class:`ValueError` where a parameter has shards, or copies, on processes that are not of these."""
        meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
        for mesh in meshes if self._group is not None else ():
            missing = set(mesh.mesh.flatten().tolist()) - set(dist.get_process_group_ranks(self._group))
            if missing:
                raise ValueError(
                    f"process_group lacks the ranks {sorted(missing)}, which hold shards of the parameters as well: "
                    "give all processes that train the model together"
                )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, equal on all of them bit for bit; one collective, or none for a single rank."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of each rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values


def products(g: Tensor, d: Tensor | None) -> Tensor:
    """``g · d``, ``‖g‖²`` and ``‖d‖²`` of one parameter, as one tensor of shape (3,).

    Args:
        g: Gradient, real or complex, of any shape. Of sharded tensors, the part that this rank holds counts.
        d: Direction, real, of the shape of ``as_real(g)``; ``None``: zero.

    Returns:
        The sums in float64 (float32 on devices without it), on the device of ``g``. Products are taken in float32 at
        least, for a gradient that is scaled to a norm near 1, and accumulated in the dtype of the result.
    """
    exact = torch.float32 if g.device.type == "mps" else torch.float64
    g = local(as_real(g)).flatten()
    norm = squared_norm(g, exact).sqrt()
    if d is None:
        zero = torch.zeros_like(norm)
        return torch.stack([zero, norm.square(), zero])
    d = local(as_real(d)).flatten()
    dtype = torch.promote_types(torch.promote_types(g.dtype, d.dtype), torch.float32)
    exponent = torch.frexp(norm).exponent  # scaling by a power of two is exact
    exponent = exponent.clamp(min=math.frexp(torch.finfo(dtype).tiny)[1])  # 2 to minus that is finite
    scale = torch.ldexp(torch.ones_like(norm), -exponent).to(dtype)
    pairs = zip(_pieces(g), _pieces(d), strict=True)
    dots = [torch.sum((a.to(dtype) * scale).mul_(b), dtype=exact) for a, b in pairs]
    return torch.stack([torch.ldexp(torch.stack(dots).sum(), exponent), norm.square(), squared_norm(d, exact)])


def squared_norm(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``‖tensor‖²`` (of this rank's part), accumulated in ``dtype``, as a 0-dim tensor."""
    norms = [torch.linalg.vector_norm(piece, dtype=dtype) for piece in _pieces(local(tensor))]
    return norms[0].square() if len(norms) == 1 else torch.stack(norms).square().sum()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), _PIECE)


def totals(parts: Sequence[Tensor], weights: Sequence[float], copies: Sequence[float]) -> Tensor:
    """Sum over parameters of ``w g·d``, ``‖g‖²`` and ``w² ‖d‖²``, as one tensor of shape (3,).

    Args:
        parts: What :func:`products` returned for each parameter.
        weights: ``w`` for each parameter, the derivative of its group's rate with respect to the scope's.
        copies: On how many ranks the same elements of each are: summed over all ranks, each counts once.
    """
    device = parts[0].device
    table = torch.stack([part.to(device) for part in parts])
    w, shares = table.new_tensor(weights), 1 / table.new_tensor(copies)
    return (table * torch.stack([w, torch.ones_like(w), w * w], dim=1) * shares[:, None]).sum(dim=0)
