"""Where the gradient vanishes in rounding, as where a network fits few data exactly, rates do not run away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_hd import Auto, Context, HypergradientDescent, HypergradientLR, Observation
from tests import reference
from tests.test_callback import Digits, digits, make_trainer

SLOW = pytest.mark.slow
NESTEROV: tuple[Any, dict[str, Any]] = (SGD, {"momentum": 0.9, "nesterov": True})


def test_a_gradient_that_is_rounding_raises_nothing_by_hand_and_in_the_formula() -> None:
    rule, formula = Auto(), reference.AutoRule()
    lr, mine = rule.first_lr(1.0, 1.0), formula.first_lr(1.0, 1.0)
    rng = np.random.default_rng(0)
    changes: list[float] = []
    for t, norm in enumerate([1.0] * 20 + list(10.0 ** np.arange(0, -9, -0.5)) + [1e-8] * 300, start=2):
        cosine, moved = rng.uniform(0.1, 0.9), float(t % 7 > 0)
        before = lr
        product = cosine * norm * moved
        lr = rule.update(lr, Observation(-product, norm, moved, -product, param_norm=1.0), Context(t))
        mine = formula.next_lr(mine, t, reference.Shown(product, norm, moved, param_norm=1.0))
        assert lr == pytest.approx(mine, rel=1e-9)
        changes.append(np.log(lr / before))
    assert min(changes[20:32]) > 0
    assert {round(change, 9) for change in changes[60:100]} == {-0.01, 0.0}, "0 without a move"


def stays_below(losses: list[float], most: float) -> bool:
    """Whether losses are below a bound after 500 steps, and never much above their value then."""
    return max(losses[500:]) < min(most, 1.5 * losses[500])


@pytest.mark.parametrize(
    ("cls", "settings", "most", "count", "reported"),
    [
        (Adam, {}, 1e-4, 64, True),
        pytest.param(Adam, {}, 1e-4, 64, False, marks=SLOW),
        pytest.param(AdamW, {}, 5e-4, 64, True, marks=SLOW),  # its decay holds the weights back
        pytest.param(AdamW, {}, 5e-4, 256, True, marks=SLOW),
        (RMSprop, {}, 5e-4, 64, True),  # its first direction is ten times as long as later ones, and bounds the rate
        pytest.param(RMSprop, {}, 5e-4, 64, False, marks=SLOW),
        (*NESTEROV, 1e-4, 64, True),
        pytest.param(*NESTEROV, 1e-4, 256, True, marks=SLOW),
    ],
)
def test_a_network_that_fits_all_data_keeps_fitting_them(
    cls: type[Optimizer], settings: dict[str, Any], most: float, count: int, reported: bool
) -> None:
    """As gradients vanish, ever higher rates seem right. Steps get long again when the scale has vanished, too."""
    x, y = (part[:count] for part in digits())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    hd = HypergradientLR(cls(network.parameters(), lr=1e-3, **settings))  # type: ignore[call-arg]
    losses = []
    for _ in range(1500):
        hd._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if reported:
            hd.observe(loss)
        hd._optimizer.step()
        losses.append(loss.item())
    assert stays_below(losses, most)


def test_in_float64_gradients_may_vanish_further() -> None:
    w = nn.Parameter(torch.ones(10, dtype=torch.float64))
    curvature = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    hd = HypergradientLR(SGD([w], lr=1e-3, momentum=0.9, nesterov=True))
    for _ in range(1500):
        hd._optimizer.zero_grad()
        (curvature * w.square()).sum().backward()  # type: ignore[no-untyped-call]
        hd._optimizer.step()
    assert w.grad is not None
    assert w.grad.norm() < 1e-10


@pytest.mark.slow
def test_a_trainer_that_overfits_one_batch_keeps_fitting_it(tmp_path: Path) -> None:
    module = Digits(Adam)
    make_trainer(tmp_path, HypergradientDescent(), overfit_batches=1, max_epochs=1500).fit(module)
    assert stays_below(module.losses, 1e-4)
