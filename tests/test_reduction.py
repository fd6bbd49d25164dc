"""Sums over tensors: dtypes, complex numbers, layouts and extremes."""

import pytest
import torch

from lightning_hd.reduction import products, totals


def expected(g: torch.Tensor, d: torch.Tensor) -> list[float]:
    g, d = g.double().flatten(), d.double().flatten()
    return [float((g * d).sum()), float((g * g).sum()), float((d * d).sum())]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)],
)
def test_products(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    g, d = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    sums = products(g, d)
    assert sums.shape == (3,)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(expected(g, d), rel=tolerance, abs=tolerance)


def test_mixed_dtypes_and_layouts() -> None:
    g = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    d = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert products(g, d).tolist() == pytest.approx(expected(g, d), rel=1e-12)
    assert products(g.transpose(0, 3), d.transpose(0, 3)).tolist() == pytest.approx(expected(g, d), rel=1e-12)


def test_a_complex_gradient_counts_its_parts() -> None:
    g = torch.tensor([1 + 2j, 3 - 1j])
    d = torch.tensor([[2.0, 1.0], [0.0, 5.0]])
    assert products(g, d).tolist() == pytest.approx([2 + 2 + 0 - 5, 15, 30])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_do_not_overflow(dtype: torch.dtype) -> None:
    g = torch.full((3_000_000,), 1e3, dtype=dtype)  # several pieces
    assert products(g, g).tolist() == pytest.approx([3e12] * 3, rel=1e-12)


def test_squares_of_huge_float32_numbers_do_not_overflow() -> None:
    g = torch.full((10,), 1e25)
    assert products(g, torch.ones(10)).tolist() == pytest.approx([1e26, 1e51, 10])


def test_totals_weigh_each_direction() -> None:
    parts = [torch.tensor([2.0, 3.0, 5.0]), torch.tensor([7.0, 11.0, 13.0])]
    assert totals(parts, [1.0, 0.5], [1, 1]).tolist() == [2 + 0.5 * 7, 14.0, 5 + 0.25 * 13]
    assert totals(parts, [1.0, 0.5], [2, 4]).tolist() == [1 + 0.125 * 7, 1.5 + 0.25 * 11, 2.5 + 0.0625 * 13]
