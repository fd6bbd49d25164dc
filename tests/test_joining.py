"""Parameters that join in mid-training, and schedules that come back to their peak: they do no harm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, ExponentialLR

from lightning_hd import HypergradientLR

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=1e-3),
    "Nesterov": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: Adam(parameters, lr=1e-3),
}


def train(name: str, kind: str, steps: int = 400) -> tuple[float, list[float], HypergradientLR]:
    """The mean loss of the last steps, and the rates of all; where layers join, they do so in the middle."""
    torch.manual_seed(0)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(32, 10))
    if kind == "unfrozen":
        body.requires_grad_(False)
    optimizer = OPTIMIZERS[name](network[1].parameters() if kind == "joining" else network.parameters())
    scheduler: Any = None
    if kind == "restarts":
        scheduler = CosineAnnealingWarmRestarts(optimizer, 80)
    if kind == "cyclic":
        scheduler = CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=40, cycle_momentum=False)
    hd, losses, lrs = HypergradientLR(optimizer), [], []
    for step in range(steps):
        if step == steps // 2 and kind == "unfrozen":
            body.requires_grad_(True)
        if step == steps // 2 and kind == "joining":
            optimizer.add_param_group({"params": body.parameters()})
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x[batch]), y[batch])
        loss.backward()
        hd.observe(loss)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
        lrs.append(hd.lrs[-1])
    return sum(losses[-40:]) / 40, lrs, hd


@pytest.mark.parametrize("kind", ["unfrozen", "joining"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_that_join_are_not_moved_at_a_rate_that_was_found_without_them(name: str, kind: str) -> None:
    loss, lrs, hd = train(name, kind)
    assert loss < 0.4
    assert lrs[200] < 0.1 * max(lrs[:200])
    assert max(lrs[200:]) > 2 * lrs[200]
    assert len(set(hd.lrs)) == 1


@pytest.mark.parametrize("kind", ["restarts", "cyclic"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_that_comes_back_to_its_peak_does_no_harm(name: str, kind: str) -> None:
    loss, lrs, _ = train(name, kind)
    assert loss < 0.4
    if kind == "restarts":  # no higher than the rule found where the schedule was above half of its peak
        assert all(lrs[step] <= 2 * max(lrs[:step]) for step in range(80, 400, 80))


def test_a_few_new_coordinates_change_nothing() -> None:
    rates = []
    for late in (False, True):
        parameters = [nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(5))]
        optimizer = Adam(parameters)
        hd = HypergradientLR(optimizer)
        for step in range(30):
            for p in parameters:
                p.grad = p.detach().clone() if p is parameters[0] or step >= 10 or not late else None
            optimizer.step()
        rates.append(hd.lrs[0])
    assert rates[1] == pytest.approx(rates[0], rel=0.1)


def test_a_group_that_is_added_at_the_scheduled_rate_is_scaled_as_the_others_are() -> None:
    parameters = [nn.Parameter(torch.ones(50)) for _ in range(2)]
    optimizer = SGD(parameters[:1], lr=1e-5)
    scheduler = ExponentialLR(optimizer, 0.99)
    hd = HypergradientLR(optimizer)
    for step in range(40):
        if step == 20:  # as BaseFinetuning.unfreeze_and_add_param_group does
            optimizer.add_param_group({"params": parameters[1:], "lr": optimizer.param_groups[0]["lr"]})
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
        if step == 20:
            assert hd.lrs[1] == pytest.approx(hd.lrs[0])
        scheduler.step()
    assert hd.lrs[1] > 100 * optimizer.param_groups[1]["lr"]
