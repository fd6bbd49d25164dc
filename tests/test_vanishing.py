"""Where the gradient vanishes in rounding, as where a network fits few data exactly, rates do not run away."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_hd import Auto, Context, HypergradientLR, Observation
from tests import reference


def test_a_gradient_that_is_rounding_raises_nothing_by_hand_and_in_the_formula() -> None:
    rule, formula = Auto(), reference.AutoRule()
    rule.first_lr(1.0, 1.0)
    formula.first = rule._own.first_lr
    rng = np.random.default_rng(0)
    lr = mine = rule._own.first_lr
    changes: list[float] = []
    for t, norm in enumerate([1.0] * 20 + list(10.0 ** np.arange(0, -9, -0.5)) + [1e-8] * 300, start=2):
        cosine, moved = rng.uniform(0.1, 0.9), float(t % 7 > 0)
        before = lr
        lr = rule.update(lr, Observation(-cosine * norm * moved, norm, moved, -cosine * norm * moved), Context(t))
        mine = formula.next_lr(mine, t, reference.Shown(cosine * norm * moved, norm, moved))
        assert lr == pytest.approx(mine, rel=1e-9)
        changes.append(np.log(lr / before))
    assert min(changes[20:32]) > 0
    assert changes[-10:] == [0.0] * 10


@pytest.mark.parametrize(
    ("cls", "settings", "reported"),
    [
        pytest.param(cls, settings, reported, marks=() if reported is by_default else pytest.mark.slow)
        for cls, settings, by_default in (
            (Adam, {}, True),
            (RMSprop, {}, False),
            (SGD, {"momentum": 0.9, "nesterov": True}, True),
        )
        for reported in (True, False)
    ],
)
def test_a_network_that_fits_all_data_keeps_fitting_them(
    cls: type[Optimizer], settings: dict[str, Any], reported: bool
) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    hd = HypergradientLR(cls(network.parameters(), lr=1e-3, **settings))  # type: ignore[call-arg]
    losses = []
    for _ in range(1000):
        hd._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if reported:
            hd.observe(loss)
        hd._optimizer.step()
        losses.append(loss.item())
    assert max(losses[500:]) < 1e-4


def test_in_float64_gradients_may_vanish_further() -> None:
    norms = {}
    for dtype in (torch.float32, torch.float64):
        w = nn.Parameter(torch.ones(10, dtype=dtype))
        curvature = torch.linspace(0.1, 1, 10, dtype=dtype)
        hd = HypergradientLR(SGD([w], lr=1e-3, momentum=0.9, nesterov=True))
        for _ in range(1500):
            hd._optimizer.zero_grad()
            (curvature * w.square()).sum().backward()  # type: ignore[no-untyped-call]
            hd._optimizer.step()
        assert w.grad is not None
        norms[dtype] = float(w.grad.norm())
    assert norms[torch.float64] < 1e-10
