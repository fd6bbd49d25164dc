"""The paper's algorithms in NumPy, float64, written from its formulas: a slow reference that knows nothing of torch.

``network_loss`` is a network of one tanh layer with its backpropagation by hand; ``train`` runs SGD-HD, SGDN-HD and
Adam-HD (arXiv 1703.04782, Section 3) on it, with the additive or the multiplicative rule; ``train_auto`` the rule auto,
written from the docstring of ``lightning_hd.Auto``.
"""

from collections.abc import Generator, Mapping, Sequence
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


def faded_mean(values: Sequence[float], memories: Sequence[float]) -> float:
    """Mean of a series in which each new number comes in with one minus its memory of the numbers before it."""
    weights = [(1 - memory) * float(np.prod(memories[i + 1 :])) for i, memory in enumerate(memories)]
    return float(np.dot(values, weights) / np.sum(weights))


def train_auto(
    method: str,
    settings: dict[str, Any] | None = None,
    weight_decay: float = 0.0,
    steps: int = STEPS,
    leaps: Mapping[int, float] | None = None,
    first_lr: float | None = None,
) -> tuple[list[float], list[Array], list[int]]:
    """Learning rate of every step with the rule auto, the parameters after the last, and the steps that braked.

    ``weight_decay`` is decoupled, as in AdamW. ``leaps`` are factors of the loss in some steps. ``first_lr`` is the
    configured rate, for ``start="configured"``. The means and sums that the rule keeps are taken over the whole
    history here.
    """
    parameters = initial_parameters()
    direction = directions(method, settings or {})
    next(direction)
    data = batches()
    lr, first = (first_lr, 0.0) if first_lr is not None else (0.0, 0.0)
    discounted: list[Array] = []
    lrs: list[float] = []
    braked: list[int] = []
    cosines: list[float] = []
    bent: list[float] = []
    logs: list[float] = []
    squared_norms: list[float] = []
    variance, brake = (np.log(2.5) / 3) ** 2, 0.0
    for t in range(1, steps + 1):
        _, g = network_loss(parameters, *data[(t - 1) % len(data)])
        g = [(leaps or {}).get(t, 1.0) * x for x in g]
        if t > 1:
            squared_norms.append(dot(g, g))
            usual_norm = np.sqrt(faded_mean(squared_norms, [1 - 1 / max(10.0, s / 50) for s in range(2, t + 1)]))
            cosines.append(dot(g, discounted) / (usual_norm * np.sqrt(dot(discounted, discounted))))
            before = cosines[-2] if len(cosines) > 1 else 0.0
            bent.append(cosines[-1] + 0.3 * min(1.0, 100 / t) * abs((cosines[-1] + before) / 2))
            squares = sum(c**2 * 0.999**age for age, c in enumerate(reversed(bent)))
            cap = 0.5 if lr < 30 * first else 0.07
            change = float(np.clip(min(1.0, 600 / t) * bent[-1] / np.sqrt(squares), -cap, cap))
            log_norm = 0.5 * np.log(dot(g, g))
            excess = 0.0
            if len(logs) >= 2:
                rise = log_norm - faded_mean(logs, [0.9] * len(logs))
                usual = max(np.log(2.5), 3 * np.sqrt(variance))
                variance = 0.995 * variance + 0.005 * min(max(rise, 0.0), 3 * usual) ** 2
                if rise > usual:
                    excess = min(rise - usual, 1.0)
                    change = max(-excess * brake, min(0.0, np.log(first / lr)) if first else -np.inf)
                    braked.append(t)
            logs.append(log_norm)
            lr *= np.exp(change)
            brake = max(0.95 * brake, excess)
        d = direction.send(g)
        d = [x + weight_decay * p for x, p in zip(d, parameters, strict=True)]
        if t == 1 and first_lr is None:
            lr = first = 1e-4 * np.sqrt(dot(parameters, parameters)) / np.sqrt(dot(d, d))
        mu = 1 - 1 / max(300.0, t / 2)
        discounted = [mu * s + x for s, x in zip(discounted, d, strict=True)] if discounted else d
        used = lr * np.exp(-brake)
        parameters = [p - used * x for p, x in zip(parameters, d, strict=True)]
        lrs.append(float(used))
    return lrs, parameters, braked


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
