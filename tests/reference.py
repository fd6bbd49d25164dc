"""The paper's algorithms in NumPy, float64, written from its formulas: a slow reference that knows nothing of torch.

``network_loss`` is a network of one tanh layer with its backpropagation by hand; ``train`` runs SGD-HD, SGDN-HD and
Adam-HD (arXiv 1703.04782, Section 3) on it, with the additive or the multiplicative rule.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[np.float64]

STEPS, BATCH, INPUTS, HIDDEN, OUTPUTS = 200, 16, 5, 8, 3


def initial_parameters(seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    shapes = [(HIDDEN, INPUTS), (HIDDEN,), (OUTPUTS, HIDDEN), (OUTPUTS,)]
    return [rng.normal(scale=0.5, size=shape) for shape in shapes]


def batches(seed: int = 1) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(INPUTS, OUTPUTS))
    inputs = [rng.normal(size=(BATCH, INPUTS)) for _ in range(STEPS)]
    return [(x, np.sin(x @ teacher) + 0.1 * rng.normal(size=(BATCH, OUTPUTS))) for x in inputs]


def network_loss(parameters: Sequence[Array], x: Array, y: Array) -> tuple[float, list[Array]]:
    """Half the mean squared error of the network, and its gradient by hand."""
    w1, b1, w2, b2 = parameters
    hidden = np.tanh(x @ w1.T + b1)
    error = hidden @ w2.T + b2 - y
    loss = 0.5 * np.mean(np.sum(error**2, axis=1))
    error_mean = error / len(x)
    back = (error_mean @ w2) * (1 - hidden**2)
    return float(loss), [back.T @ x, back.sum(axis=0), error_mean.T @ hidden, error_mean.sum(axis=0)]


def directions(method: str, settings: dict[str, Any]) -> Generator[list[Array], list[Array], None]:
    """Send it a gradient, get back d_t, so that u_t = -α_t d_t."""
    g = yield []
    first = [np.zeros_like(x) for x in g]
    second = [np.zeros_like(x) for x in g]
    t = 0
    while True:
        t += 1
        if method == "sgd":
            d = g
        elif method == "sgdn":
            mu = settings["momentum"]
            first = [mu * v + x for v, x in zip(first, g, strict=True)]
            d = [x + mu * v for v, x in zip(first, g, strict=True)]
        elif method == "heavy_ball":
            mu, tau = settings["momentum"], settings.get("dampening", 0.0)
            first = [x.copy() if t == 1 else mu * v + (1 - tau) * x for v, x in zip(first, g, strict=True)]
            d = first
        elif method == "adam":
            b1, b2 = settings.get("betas", (0.9, 0.999))
            first = [b1 * m + (1 - b1) * x for m, x in zip(first, g, strict=True)]
            second = [b2 * v + (1 - b2) * x**2 for v, x in zip(second, g, strict=True)]
            d = [
                (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + settings.get("eps", 1e-8))
                for m, v in zip(first, second, strict=True)
            ]
        else:
            raise ValueError(method)
        g = yield [x.copy() for x in d]


def dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    return float(sum(np.sum(x * y) for x, y in zip(a, b, strict=True)))


def train(
    method: str, rule: str, lr: float, beta: float, settings: dict[str, Any] | None = None
) -> tuple[list[float], list[Array]]:
    """Learning rate of every step, and the parameters after the last."""
    parameters = initial_parameters()
    direction = directions(method, settings or {})
    next(direction)
    last_d: list[Array] | None = None
    lrs = []
    for x, y in batches():
        _, g = network_loss(parameters, x, y)
        if last_d is not None:
            h = -dot(g, last_d)
            if rule == "additive":
                lr = lr - beta * h
            else:
                lr = lr * (1 - beta * h / (np.sqrt(dot(g, g)) * np.sqrt(dot(last_d, last_d))))
        last_d = direction.send(g)
        parameters = [p - lr * d for p, d in zip(parameters, last_d, strict=True)]
        lrs.append(lr)
    return lrs, parameters


def torch_network() -> nn.Sequential:
    """The same network in torch, with the same initial parameters."""
    network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).double()
    with torch.no_grad():
        for p, value in zip(network.parameters(), initial_parameters(), strict=True):
            p.copy_(torch.from_numpy(value))
    return network


def torch_loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same loss in torch."""
    loss: torch.Tensor = 0.5 * (network(x) - y).square().sum(dim=1).mean()
    return loss


def torch_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
