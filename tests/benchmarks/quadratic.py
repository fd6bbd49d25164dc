"""A noisy, ill-conditioned quadratic, for which the best constant rate of SGD is known without a grid."""

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

DIMENSION = 200
LOWEST, HIGHEST = -3, 1
"""The curvatures span four orders of magnitude: 1e-3 to 1e1."""
NOISE = 0.1


class Quadratic(nn.Module):
    """``½ Σ λ_i x_i²``, with gradient noise whose covariance is that of the curvature, as near an optimum."""

    curvature: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.randn(DIMENSION, generator=generator))
        self.register_buffer("curvature", torch.logspace(LOWEST, HIGHEST, DIMENSION))
        self.generator = generator

    def forward(self) -> Tensor:
        """The noiseless loss; its gradient is the noisy one."""
        noise = torch.randn(DIMENSION, generator=self.generator) * NOISE * self.curvature.sqrt()
        loss = 0.5 * (self.curvature * self.point**2).sum()
        slope = (noise * self.point).sum()
        return loss + (slope - slope.detach())  # adds 0 to the value and the noise to the gradient


def expected_loss(rate: float, start: npt.NDArray[np.float64], steps: int) -> float:
    r"""The expected mean of the noiseless loss over the last eighth of ``steps`` steps of SGD at a constant rate.

    Step by step ``x ← x - α (λ x + z)`` with ``z ~ N(0, σ² λ)``, so that the second moment of every coordinate follows
    the linear recursion ``E x² ← (1 - αλ)² E x² + α² σ² λ``, which is a geometric series.

    Args:
        rate: ``α``, below ``2/λ`` for all curvatures.
        start: The first point.
        steps: Number of steps; the loss of step ``t`` is taken before its update.
    """
    curvature = np.logspace(LOWEST, HIGHEST, DIMENSION)
    updates = np.arange(steps - steps // 8, steps)[:, None]
    shrinkage = (1 - rate * curvature) ** (2 * updates)
    lost = rate * curvature * (2 - rate * curvature)  # 1 - (1 - αλ)², without cancellation
    moments = shrinkage * start**2 + (rate * NOISE) ** 2 * curvature * (1 - shrinkage) / lost
    return float((0.5 * moments @ curvature).mean())


def best_constant(seeds: Sequence[int], steps: int) -> tuple[float, float]:
    """The constant rate for SGD whose expected loss, median over the seeds' first points, is lowest; and that loss."""
    starts = [first_point(seed) for seed in seeds]

    def objective(log_rate: float) -> float:
        return median(expected_loss(float(np.exp(log_rate)), start, steps) for start in starts)

    bounds = (np.log(1e-6), np.log(2 / 10**HIGHEST) - 1e-6)  # beyond 2/λ it diverges
    found = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)), float(found.fun)


def sampler(seed: int) -> torch.Generator:
    """The source of a seed's data, apart from that of the initialisation."""
    return torch.Generator().manual_seed(seed + 1000)


def first_point(seed: int) -> npt.NDArray[np.float64]:
    """Where the runs of a seed begin."""
    return Quadratic(sampler(seed)).point.detach().double().numpy()
