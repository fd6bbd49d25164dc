"""Losses that move: labels that change, a penalty that comes by and by, an opponent; and labels that are wrong."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.digits import split
from tests.benchmarks.fashion import Scaled, fashion
from tests.benchmarks.problems import Problem, batches, mlp, supervised
from tests.benchmarks.quadratic import sampler

CLASSES = 10
LENGTH = 1200
"""The number of steps of the tasks that change with time."""


def noisy_labels(seed: int, data: Path) -> Problem:
    """Three labels of ten are drawn at random."""
    generator = sampler(seed)
    (x, y), val = fashion(data)
    drawn = torch.randint(0, CLASSES, y.shape, generator=generator)
    wrong = torch.where(torch.rand(len(y), generator=generator) < 0.3, drawn, y)
    return supervised(nn.Sequential(Scaled(), *mlp(784, 128, CLASSES)), (x, wrong), val, 128, generator)


def changed_labels(seed: int, data: Path) -> Problem:
    """The names of the classes are exchanged at half of the run, as where another data set takes over."""
    generator = sampler(seed)
    (x, y), (x_val, y_val) = fashion(data)
    network = nn.Sequential(Scaled(), *mlp(784, 128, CLASSES))
    order, names, taken = batches(len(x), 128, generator), torch.randperm(CLASSES, generator=generator), [0]

    def train_loss() -> Tensor:
        batch = next(order)
        taken[0] += 1
        return F.cross_entropy(network(x[batch]), y[batch] if taken[0] <= LENGTH // 2 else names[y[batch]])

    return Problem(network, train_loss, lambda network: F.cross_entropy(network(x_val), names[y_val]))


class Coder(nn.Module):
    """A variational auto-encoder of the digits; returns both parts of the bound."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 64, 2 * width), mlp(width, 64, 64)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        pixels = self.decoder(mean + noise * (log_variance / 2).exp())
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
        return F.binary_cross_entropy_with_logits(pixels, x, reduction="none").sum(1).mean(), divergence


def annealed(seed: int, data: Path) -> Problem:
    """The divergence gets its weight by and by, so the loss rises."""
    generator = sampler(seed)
    (x, _), (x_val, _) = split()
    network, order, taken = Coder(), batches(len(x), 64, generator), [0]

    def train_loss() -> Tensor:
        batch = next(order)
        taken[0] += 1
        misfit, divergence = network(x[batch], torch.randn(len(batch), 6, generator=generator))
        loss: Tensor = misfit + min(1.0, 2 * taken[0] / LENGTH) * divergence
        return loss

    def val_loss(network: nn.Module) -> Tensor:
        loss: Tensor = sum(network(x_val, torch.randn(len(x_val), 6, generator=torch.Generator().manual_seed(0))))
        return loss

    return Problem(network, train_loss, val_loss)


def adversaries(seed: int, data: Path) -> Problem:
    """A GAN for eight points on a ring. Its measure is the energy distance to the points."""
    generator = sampler(seed)
    maker, judge = mlp(4, 64, 64, 2), mlp(2, 64, 64, 1, activation=nn.SiLU)

    def real(count: int, generator: torch.Generator) -> Tensor:
        angle = torch.randint(0, 8, (count,), generator=generator) * (torch.pi / 4)
        ring = torch.stack([angle.cos(), angle.sin()], 1) * 1.5
        return ring + 0.05 * torch.randn(count, 2, generator=generator)

    def made(count: int, generator: torch.Generator) -> Tensor:
        points: Tensor = maker(torch.randn(count, 4, generator=generator))
        return points

    fixed = torch.Generator().manual_seed(0)
    latent, points = torch.randn(128, 4, generator=fixed), real(128, fixed)

    def judge_loss() -> Tensor:
        fake = made(64, generator).detach()
        return F.softplus(-judge(real(64, generator))).mean() + F.softplus(judge(fake)).mean()

    def maker_loss() -> Tensor:
        return F.softplus(-judge(made(64, generator))).mean()

    def distance() -> Tensor:
        with torch.no_grad():
            fake = maker(latent)
            apart = torch.cdist(fake, points).mean() * 2
            return apart - torch.cdist(fake, fake).mean() - torch.cdist(points, points).mean()

    return Problem(maker, maker_loss, players=[(judge, judge_loss), (maker, maker_loss)], measure=distance)
