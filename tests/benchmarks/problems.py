"""What a learning problem is: a network, the loss of its next batch, and a validation loss."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Problem:
    """A task with a seed: what a training loop needs.

    Networks that play against each other are ``players``: each has an optimizer and a loss, and they move in turns.
    """

    network: nn.Module
    train_loss: Callable[[], Tensor]  # of the next batch
    val_loss: Callable[[nn.Module], Tensor] | None = None  # of a network of that kind
    project: Callable[[], object] = lambda: None  # after each step: puts the parameters back where they may be
    players: Sequence[tuple[nn.Module, Callable[[], Tensor]]] = ()  # the network alone, unless there are several
    measure: Callable[[], Tensor] | None = None  # what the table shows instead of the loss


@dataclass(frozen=True)
class Task:
    """A learning problem, up to the seed."""

    title: str
    steps: int
    build: Callable[[int, Path], Problem]
    files: tuple[str, ...] = ()  # that it needs in the directory of Fashion-MNIST
    optimizers: tuple[str, ...] = ("SGD", "Nesterov", "Adam")
    decay: float = 0.0  # decoupled weight decay

    def missing(self, data: Path) -> list[str]:
        """The files that are not there."""
        return [str(data / name) for name in self.files if not (data / name).exists()]


Labelled = tuple[Tensor, Tensor]


def batches(samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches, in a new order every epoch; an incomplete last batch is left out."""
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order[: samples - samples % size].split(size)


def supervised(
    network: nn.Module,
    train: Labelled,
    val: Labelled,
    size: int,
    generator: torch.Generator,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Problem:
    """Inputs and targets, in batches of ``size``."""
    x, y = train
    order = batches(len(x), size, generator)

    def train_loss() -> Tensor:
        batch = next(order)
        return criterion(network(x[batch]), y[batch])

    return Problem(network, train_loss, lambda network: criterion(network(val[0]), val[1]))


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])
