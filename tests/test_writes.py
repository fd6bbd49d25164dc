"""Rates that a loop, or a scheduler which leaves no mark, writes into the groups between steps."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_hd import HypergradientDescent, HypergradientLR
from tests.test_callback import Reference, make_trainer


def train(
    change: Callable[[Optimizer, int], object], rule: Any, scheduled: bool | None = None
) -> tuple[Any, list[str]]:
    """Forty steps; what changes the rate comes before each of them."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(20))
    optimizer = SGD([w], lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hd = HypergradientLR(optimizer, rule, scheduled=scheduled)
        for t in range(40):
            change(optimizer, t)
            optimizer.zero_grad()
            (w - 1).square().sum().backward()
            optimizer.step()
    return hd, [str(warning.message) for warning in caught if "written" in str(warning.message)]


def cosine(optimizer: Optimizer, t: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * t / 40)) / 2 + 1e-9


def warm_up(optimizer: Optimizer, t: int) -> None:
    if t < 20:
        optimizer.param_groups[0]["lr"] = 0.01 * (t + 1) / 20


def plateau() -> Callable[[Optimizer, int], object]:
    schedulers: list[ReduceLROnPlateau] = []

    def step(optimizer: Optimizer, t: int) -> None:
        if not schedulers:
            schedulers.append(ReduceLROnPlateau(optimizer, patience=3))
        schedulers[0].step(1.0)

    return step


@pytest.mark.parametrize("rule", ["auto", "additive", "multiplicative"])
@pytest.mark.parametrize("change", [cosine, warm_up, plateau()])
def test_a_schedule_that_is_written_is_reported_once_and_can_be_named(change: Any, rule: Any) -> None:
    change = plateau() if change not in (cosine, warm_up) else change
    (told,) = train(change, rule)[1]
    assert "`scheduled=True`" in told
    change = plateau() if change not in (cosine, warm_up) else change
    hd, told_then = train(change, rule, scheduled=True)
    assert told_then == []
    assert hd.scales[0] != 1


@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_a_few_writes_are_taken_over_in_silence(rule: Any) -> None:
    def change(optimizer: Optimizer, t: int) -> None:
        if t in (10, 20, 21, 22, 30):
            optimizer.param_groups[0]["lr"] = 0.001 * t

    assert train(change, rule)[1] == []


@pytest.mark.parametrize(("count", "told"), [(11, 0), (12, 1)])
def test_rates_that_are_written_before_twelve_steps_in_a_row_are_reported(count: int, told: int) -> None:
    def change(optimizer: Optimizer, t: int) -> None:
        if 1 < t <= 1 + count or 20 < t <= 31:  # a row ends where nothing is written
            optimizer.param_groups[0]["lr"] = 0.001 * t

    assert len(train(change, "additive")[1]) == told


@pytest.mark.parametrize(("cuts", "told"), [((10, 20), 0), ((10, 20, 30), 1)])
def test_the_third_cut_by_the_same_factor_is_reported(cuts: tuple[int, ...], told: int) -> None:
    def change(optimizer: Optimizer, t: int) -> None:
        if t in cuts:
            optimizer.param_groups[0]["lr"] *= 0.5
        elif t == 25:  # a rise is no cut
            optimizer.param_groups[0]["lr"] *= 1.5

    assert len(train(change, "additive")[1]) == told


def test_a_schedule_in_optimizer_step_is_followed_where_the_callback_is_told(tmp_path: Path) -> None:
    class WarmingUp(Reference):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 * min(1.0, (batch_idx + 1) / 100)
            super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def fit(scheduled: bool | None) -> HypergradientDescent:
        hd = HypergradientDescent("multiplicative", scheduled=scheduled)
        make_trainer(tmp_path, hd).fit(WarmingUp())
        return hd

    with pytest.warns(
        RuntimeWarning, match=r"HypergradientDescent\(SGD\): learning rates are written .*scheduled=True"
    ):
        fit(None)
    hd = fit(True)
    scale = hd.engines[0].scales[0]
    assert scale > 1.5
    assert hd.lrs["lr-SGD"][-1] == pytest.approx(0.01 * scale)
