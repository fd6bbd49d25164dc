"""Dot products and norms of flat vectors of any size and scale, at least as precise as float32."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_hd.processes import exact_dtype, widen

_ROW = 2**10
"""The length of a row. The numbers in a row are added in their own dtype, the sums of rows in float64."""

_SAFE = (1e-30, 1e30)
"""A squared norm between these has lost nothing to underflow or overflow in float32."""


def products(
    g: Tensor, d: Tensor | None, weights: Tensor | None = None, wide: bool = False, spare: Tensor | None = None
) -> Tensor:
    """``g·d``, ``‖g‖²`` and ``‖d‖²``, as one tensor of shape (3,) in float64 (float32 on devices without it).

    Args:
        g: The gradient, of shape (n,).
        d: The direction, of shape (n,); ``None``: zero.
        weights: The weight of each number, of shape (n,); ``None``: all weights are 1.
        wide: Whether to compute in float64. In float32, numbers are lost whose squares are out of range.
        spare: A tensor of the shape and dtype of ``g`` to write products into; ``None``: one is made.
    """
    exact = exact_dtype(g.device)
    g_rows, d_rows, w_rows = (None if x is None else _rows(x, exact if wide else None) for x in (g, d, weights))
    assert g_rows is not None
    squares = _squares(g_rows, w_rows)
    if d_rows is None:
        zero = torch.zeros_like(squares)
        return torch.stack([zero, squares, zero]).sum(1, dtype=exact)
    fits = spare is not None and g_rows.dtype == d_rows.dtype == spare.dtype and len(g) % _ROW == 0
    product = torch.mul(g_rows, d_rows, out=spare.view(-1, _ROW) if fits and spare is not None else None)
    product = product if w_rows is None else product * w_rows
    sums = [rows.to(exact) for rows in (product.sum(1), squares, _squares(d_rows, w_rows))]
    return torch.stack(sums).sum(1)


def is_doubtful(g_squared: float, d_squared: float) -> bool:
    """Whether norms must be computed again in float64."""
    low, high = _SAFE
    return not (low < g_squared < high and low < d_squared < high)


def squared_norm(tensor: Tensor) -> Tensor:
    """``‖tensor‖²``, accumulated in the widest dtype of the device, as a 0-dim tensor."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=exact_dtype(tensor.device))
    return norm.square()


def _rows(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = widen(x) if dtype is None else x.to(dtype)
    padded: Tensor = F.pad(x, (0, -len(x) % _ROW)) if len(x) % _ROW else x
    return padded.view(-1, _ROW)


def _squares(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        return (rows * rows * weights).sum(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()
