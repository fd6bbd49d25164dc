"""Networks that were trained before: low-rank adapters on a frozen one, fine-tuning of a whole one."""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.digits import split
from tests.benchmarks.problems import Problem, batches, mlp, supervised
from tests.benchmarks.quadratic import sampler


@functools.cache
def trained(seed: int) -> dict[str, Tensor]:
    """The parameters of a classifier of digits, after 600 steps of Adam."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    (x, y), _ = split()
    order = batches(len(x), 64, sampler(seed + 500))
    for _ in range(600):
        optimizer.zero_grad()
        batch = next(order)
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


class Adapted(nn.Module):
    """A frozen linear layer plus a product of two thin matrices, with dropout before it (arXiv 2106.09685, 4.1)."""

    def __init__(self, layer: nn.Linear, rank: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(self.dropout(x)))
        return y


def transposed(seed: int, size: int, network: nn.Module) -> Problem:
    """The digits mirrored along their diagonal, which the network was not trained on."""
    (x, y), (x_val, y_val) = split()
    swapped, swapped_val = (z.view(-1, 8, 8).transpose(1, 2).reshape(-1, 64) for z in (x, x_val))
    return supervised(network, (swapped, y), (swapped_val, y_val), size, sampler(seed))


def adapters(seed: int, data: Path, dropout: float) -> Problem:
    network = mlp(64, 64, 64, 10)
    network.load_state_dict(trained(seed))
    layers = [Adapted(module, dropout=dropout) if isinstance(module, nn.Linear) else module for module in network]
    problem = transposed(seed, 32, nn.Sequential(*layers))

    def val_loss(network: nn.Module) -> Tensor:
        assert problem.val_loss is not None
        was = network.training
        try:
            return problem.val_loss(network.eval())
        finally:
            network.train(was)

    return Problem(problem.network, problem.train_loss, val_loss)


def fine_tuning(seed: int, data: Path) -> Problem:
    network = mlp(64, 64, 64, 10)
    network.load_state_dict(trained(seed))
    return transposed(seed, 32, network)
