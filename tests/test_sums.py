"""Sums over flat vectors: dtypes, sizes, scales and weights."""

import pytest
import torch
from torch import Tensor

from lightning_hd.hypergradient.last_step import products


def expected(g: Tensor, d: Tensor) -> list[float]:
    g, d = g.double().flatten(), d.double().flatten()
    return [float((g * d).sum()), float((g * g).sum()), float((d * d).sum())]


def read(numbers: list[Tensor]) -> list[float]:
    return [number.item() for number in numbers]


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_products(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    g, d = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    sums = products(g, d)
    assert all(number.shape == () and number.dtype == torch.float64 for number in sums)
    assert read(sums) == pytest.approx(expected(g, d), rel=1e-13, abs=1e-13 * size**0.5)
    assert read(products(g, None)) == [0.0, sums[1].item(), 0.0]


def test_mixed_dtypes() -> None:
    g, d = torch.randn(1500), torch.randn(1500, dtype=torch.float64)
    assert read(products(g, d)) == pytest.approx(expected(g, d), rel=1e-13, abs=1e-12)


def test_weights_count_numbers_several_times() -> None:
    g, d = torch.randn(1100, dtype=torch.float64), torch.randn(1100, dtype=torch.float64)
    weights = torch.arange(1100, dtype=torch.float64) % 3
    repeated = expected(g.repeat_interleave(weights.long()), d.repeat_interleave(weights.long()))
    assert read(products(g, d, weights)) == pytest.approx(repeated, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_do_not_overflow(dtype: torch.dtype) -> None:
    g = torch.full((3_000_000,), 1e3, dtype=dtype)
    assert read(products(g, g)) == pytest.approx([3e6 * float(g[0]) ** 2] * 3, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e25])
def test_squares_of_tiny_and_huge_float32_numbers_are_right(scale: float) -> None:
    g = torch.full((10,), scale)
    assert read(products(g, torch.ones(10))) == pytest.approx([10 * scale, 10 * scale**2, 10], rel=1e-6)
