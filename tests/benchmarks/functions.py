"""Networks that are fitted to functions: deep regression, a picture, a differential equation."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.digits import digits
from tests.benchmarks.problems import Labelled, Problem, mlp, supervised
from tests.benchmarks.quadratic import sampler


def tanh_regression(seed: int, data: Path) -> Problem:
    """A deep network of tanh units learns the sine of a sum."""
    generator = sampler(seed)

    def sample(count: int, generator: torch.Generator) -> Labelled:
        x = torch.randn(count, 20, generator=generator)
        return x, torch.sin(x.sum(1, keepdim=True) / 2)

    train = sample(2000, generator)
    val = sample(2000, torch.Generator().manual_seed(seed + 2000))
    return supervised(mlp(20, *[50] * 6, 1, activation=nn.Tanh), train, val, 64, generator, F.mse_loss)


class Sines(nn.Module):
    """A coordinate network: layers of sines, with the initialisation of arXiv 2006.09661, section 3.2."""

    def __init__(self, width: int = 64, frequency: float = 15.0) -> None:
        super().__init__()
        layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, width)]
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(width, 1)
        self.frequency = frequency
        nn.init.uniform_(layers[0].weight, -1 / 2, 1 / 2)
        for layer in (*layers[1:], self.out):
            bound = (6 / width) ** 0.5 / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        y: Tensor = self.out(x)
        return y


def picture(seed: int, data: Path) -> Problem:
    """A mosaic of 100 digits, brightness from coordinates; a quarter of the pixels is held out."""
    generator = sampler(seed)
    tiles = digits()[0][:100].view(10, 10, 8, 8)
    y = tiles.permute(0, 2, 1, 3).reshape(-1, 1) * 2 - 1
    grid = torch.linspace(-1, 1, 80)
    x = torch.cartesian_prod(grid, grid)
    ids = torch.arange(6400)
    held_out = (ids // 80 + ids % 80) % 4 == 0
    return supervised(Sines(), (x[~held_out], y[~held_out]), (x[held_out], y[held_out]), 600, generator, F.mse_loss)


def equation(seed: int, data: Path) -> Problem:
    """``-u'' = f`` with ``u = 0`` at both ends, where ``u = sin πx + sin 4πx / 4``: all points in each batch.

    The method is that of physics-informed networks, Raissi et al., Journal of Computational Physics 378, 2019.
    """
    network = mlp(1, 32, 32, 1, activation=nn.Tanh)

    def residual(network: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        with torch.enable_grad():
            u = network(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        f = torch.pi**2 * ((torch.pi * x).sin() + 4 * (4 * torch.pi * x).sin())
        ends = network(torch.tensor([[0.0], [1.0]]))
        loss: Tensor = ((curvature + f) / 10).square().mean() + 10 * ends.square().mean()
        return loss

    def error(network: nn.Module) -> Tensor:
        x = torch.linspace(0, 1, 201).unsqueeze(1)
        u = (torch.pi * x).sin() + (4 * torch.pi * x).sin() / 4
        return F.mse_loss(network(x), u)

    points = torch.linspace(0, 1, 64).unsqueeze(1)
    return Problem(network, lambda: residual(network, points), error)
