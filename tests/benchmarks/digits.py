"""Scikit-learn's digits, 8 by 8: classified, compressed, denoised, with weights that are held small."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.problems import Labelled, Problem, batches, mlp, supervised
from tests.benchmarks.quadratic import sampler

HELD_OUT = 297


@functools.cache
def digits() -> Labelled:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def split() -> tuple[Labelled, Labelled]:
    """What is trained on, and what is not."""
    x, y = digits()
    return (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:])


def classify(seed: int, data: Path, size: int | None, widths: tuple[int, ...] = (64, 64, 10)) -> Problem:
    """A network with ReLUs; ``size=None`` is the full batch."""
    generator = sampler(seed)
    train, val = split()
    return supervised(mlp(*widths), train, val, size or len(train[0]), generator)


def logistic(seed: int, data: Path) -> Problem:
    """Logistic regression in full batches, with a penalty, so that it is strongly convex."""
    problem = classify(seed, data, None, (64, 10))

    def train_loss() -> Tensor:
        return problem.train_loss() + sum(p.square().sum() for p in problem.network.parameters()) * 1e-3

    return Problem(problem.network, train_loss, problem.val_loss)


def compress(seed: int, data: Path) -> Problem:
    """An auto-encoder with eight units in the middle."""
    generator = sampler(seed)
    (x, _), (x_val, _) = split()
    return supervised(mlp(64, 48, 8, 48, 64), (x, x), (x_val, x_val), 64, generator, F.mse_loss)


# ---------------------------------------------------------------------- weights that are held small


def clip(network: nn.Module) -> None:
    """No weight above 0.2."""
    for p in network.parameters():
        p.data.clamp_(-0.2, 0.2)


def normalize_rows(network: nn.Module) -> None:
    """The weights of each unit have norm 1."""
    for p in network.parameters():
        if p.dim() == 2:
            p.data.div_(p.data.norm(dim=1, keepdim=True))


def constrained(seed: int, data: Path, project: Callable[[nn.Module], None]) -> Problem:
    """Weights that are clipped after each step."""
    problem = classify(seed, data, 64, (64, 32, 10))
    project(problem.network)
    return Problem(problem.network, problem.train_loss, problem.val_loss, lambda: project(problem.network))


# ---------------------------------------------------------------------- a diffusion model


class Denoiser(nn.Module):
    """Tells the noise in noisy pictures, of which the level of the noise is known."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(64 + 8, 128, 128, 64, activation=nn.SiLU)
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angles = level.unsqueeze(1) * self.get_buffer("frequencies")
        y: Tensor = self.network(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        return y


def diffuse(seed: int, data: Path) -> Problem:
    """Pictures mixed with noise at levels between 0 and 1, as diffusion models learn."""
    generator = sampler(seed)
    (x, _), (x_val, _) = split()
    network, order = Denoiser(), batches(len(x), 128, generator)

    def loss(network: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        level = torch.rand(len(x), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        angle = (level * torch.pi / 2).unsqueeze(1)
        return F.mse_loss(network((2 * x - 1) * angle.cos() + noise * angle.sin(), level), noise)

    def val_loss(network: nn.Module) -> Tensor:
        fixed = torch.Generator().manual_seed(0)
        return torch.stack([loss(network, x_val, fixed) for _ in range(8)]).mean()

    return Problem(network, lambda: loss(network, x[next(order)], generator), val_loss)
