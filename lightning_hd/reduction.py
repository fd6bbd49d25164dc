"""Dot products and norms over the tensors of a model, with enough digits for every dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PIECE = 2**20
"""Elements whose products are held at a time. ``torch.dot`` would hold none, but on CPU it adds float32 numbers one
after the other, which is off by 3 % for 1e8 of them."""


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real one of twice the size that the optimizers see; any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widen(tensor: Tensor) -> Tensor:
    """A tensor of less than 32 bits an element in float32; any other tensor as it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def products(g: Tensor, d: Tensor | None) -> Tensor:
    """``g · d``, ``‖g‖²`` and ``‖d‖²`` of one parameter, as one tensor of shape (3,).

    Args:
        g: Gradient, real or complex, of any shape.
        d: Direction, real, of the shape of ``as_real(g)``; ``None``: zero.

    Returns:
        The sums in float64 (float32 on devices without it), on the device of ``g``. Products are taken in float32 at
        least, for a gradient that is scaled to a norm near 1, and accumulated in the dtype of the result.
    """
    exact = torch.float32 if g.device.type == "mps" else torch.float64
    g = widen(as_real(g))
    if d is None:
        zero = torch.zeros((), dtype=exact, device=g.device)
        return torch.stack([zero, squared_norm(g, exact), zero])
    d = widen(as_real(d))
    if g.dtype != d.dtype:
        dtype = torch.promote_types(g.dtype, d.dtype)
        g, d = g.to(dtype), d.to(dtype)
    norm = torch.linalg.vector_norm(g, dtype=exact)
    exponent = torch.frexp(norm).exponent  # scaling by a power of two is exact
    scale = torch.ldexp(torch.ones_like(norm), -exponent).to(g.dtype)
    pieces = zip(torch.split(g.flatten(), _PIECE), torch.split(d.flatten(), _PIECE), strict=True)
    dot = torch.stack([torch.sum((a * scale).mul_(b), dtype=exact) for a, b in pieces]).sum()
    return torch.stack([torch.ldexp(dot, exponent), norm.square(), squared_norm(d, exact)])


def squared_norm(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``‖tensor‖²``, accumulated in ``dtype``, as a 0-dim tensor."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square()


def totals(parts: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float, float]:
    """Sum over parameters of ``w g·d``, ``‖g‖²`` and ``w² ‖d‖²``.

    Args:
        parts: What :func:`products` returned for each parameter.
        weights: ``w`` for each parameter, the derivative of its group's rate with respect to the scope's.

    Returns:
        The three sums as Python floats.
    """
    device = parts[0].device
    table = torch.stack([part.to(device) for part in parts])
    w = table.new_tensor(weights)
    dot, g_squared, d_squared = (table * torch.stack([w, torch.ones_like(w), w * w], dim=1)).sum(dim=0).tolist()
    return dot, g_squared, d_squared
