"""A table with columns of categories, and a graph of which a few nodes have labels."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.digits import digits
from tests.benchmarks.problems import Problem, batches, mlp
from tests.benchmarks.quadratic import sampler

ROWS, HELD_OUT, COLUMNS, NUMBERS, VALUES = 12_000, 2_000, 6, 8, 40


class Tabular(nn.Module):
    """A vector for each value of each column of categories, beside the numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.vectors = nn.ModuleList(nn.Embedding(VALUES, width) for _ in range(COLUMNS))
        self.network = mlp(COLUMNS * width + NUMBERS, 64, 64, 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        vectors = [vector(column) for vector, column in zip(self.vectors, categories.unbind(1), strict=True)]
        logits: Tensor = self.network(torch.cat([*vectors, numbers], 1)).squeeze(1)
        return logits


def table(seed: int, data: Path) -> Problem:
    """A made table: the chance of "yes" depends on single values, on pairs of columns, and on the numbers."""
    drawn = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, VALUES + 1)  # few values are frequent, as in real tables
    categories = torch.multinomial(weights, ROWS * COLUMNS, replacement=True, generator=drawn).view(ROWS, COLUMNS)
    numbers = torch.randn(ROWS, NUMBERS, generator=drawn)
    single = torch.randn(COLUMNS, VALUES, generator=drawn)
    paired = torch.randn(VALUES, VALUES, generator=drawn)
    score = single[torch.arange(COLUMNS), categories].sum(1) + 2 * paired[categories[:, 0], categories[:, 1]]
    score = score + numbers[:, 0] * numbers[:, 1] + numbers[:, 2].abs()
    y = (torch.rand(ROWS, generator=drawn) < torch.sigmoid(score - score.median())).float()
    generator = sampler(seed)
    network, order = Tabular(), batches(ROWS - HELD_OUT, 64, generator)

    def loss(network: nn.Module, rows: Tensor | slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(network(categories[rows], numbers[rows]), y[rows])

    held_out = slice(ROWS - HELD_OUT, None)
    return Problem(network, lambda: loss(network, next(order)), lambda network: loss(network, held_out))


class GraphNetwork(nn.Module):
    """Two layers that average over neighbours, with dropout before each."""

    def __init__(self, average: Tensor, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("average", average)
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        average = self.get_buffer("average")
        hidden = F.relu(average @ self.first(F.dropout(x, 0.5, self.training)))
        y: Tensor = average @ self.second(F.dropout(hidden, 0.5, self.training))
        return y


def graph(seed: int, data: Path) -> Problem:
    """Digits joined to those that look alike. A tenth of them has labels; all are in each batch. With a penalty."""
    x, y = digits()
    near = torch.cdist(x, x).topk(8, largest=False).indices
    joined = torch.zeros(len(x), len(x)).scatter_(1, near, 1.0)
    joined = ((joined + joined.T) > 0).float()
    average = (joined / joined.sum(1, keepdim=True)).to_sparse_csr()
    network = GraphNetwork(average)
    known = torch.rand(len(x), generator=sampler(seed)) < 0.1

    def val_loss(network: nn.Module) -> Tensor:
        try:
            return F.cross_entropy(network.eval()(x)[~known], y[~known])
        finally:
            network.train()

    def train_loss() -> Tensor:
        penalty = sum(p.square().sum() for p in network.parameters())
        return F.cross_entropy(network(x)[known], y[known]) + 1e-3 * penalty

    return Problem(network, train_loss, val_loss)
