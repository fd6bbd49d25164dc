"""Rates that a loop, or a scheduler which leaves no mark, writes into the groups between steps."""

import logging
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
@pytest.mark.parametrize("change", [cosine, warm_up, plateau])
def test_a_schedule_that_is_written_is_reported_once_and_can_be_named(change: Any, rule: Any) -> None:
    (told,) = train(plateau() if change is plateau else change, rule)[1]
    assert "pass HypergradientLR(scheduled=True)" in told
    hd, told_then = train(plateau() if change is plateau else change, rule, scheduled=True)
    assert told_then == []
    assert hd.scales[0] != 1
    assert hd.stats.writes == 0


@pytest.mark.parametrize("rule", ["auto", "additive"])
@pytest.mark.parametrize("steps", [(), (20,), (20, 21), (1, 39), (10, 20, 30)])
def test_the_second_write_is_reported_at_whatever_distance(steps: tuple[int, ...], rule: Any) -> None:
    def change(optimizer: Optimizer, t: int) -> None:
        if t == 0 or t in steps:  # what comes before the first step is the configured rate
            optimizer.param_groups[0]["lr"] = 0.001 * (t + 1)

    hd, told = train(change, rule)
    assert len(told) == (len(steps) > 1)
    assert hd.stats.writes == len(steps)


def test_a_write_becomes_the_new_rate_however_many_there_were() -> None:
    def change(optimizer: Optimizer, t: int) -> None:
        if t in (10, 20, 30):
            optimizer.param_groups[0]["lr"] = 0.001 * t

    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(20))
    optimizer = SGD([w], lr=0.01)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-9)
    for t in range(40):
        change(optimizer, t)
        optimizer.zero_grad()
        (w - 1).square().sum().backward()
        if t == 20:
            with pytest.warns(RuntimeWarning, match="were written into the parameter groups again"):
                optimizer.step()
        else:
            optimizer.step()
        if t >= 10:
            assert hd.lrs == pytest.approx([0.001 * (t // 10 * 10)], rel=1e-3)


class Decaying(Reference):
    """Its own code decays the rate once per epoch."""

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 * 0.5**self.current_epoch


class WarmingUp(Reference):
    """Its own code warms the rate up before each step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 * min(1.0, (batch_idx + 1) / 100)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


@pytest.mark.parametrize(("module", "epochs", "last"), [(Decaying, 4, 0.01 * 0.5**3), (WarmingUp, 1, 0.01)])
def test_a_schedule_of_the_module_is_told_and_followed_where_the_callback_is_told(
    module: type[Reference], epochs: int, last: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(scheduled: bool | None) -> tuple[HypergradientDescent, list[str]]:
        hd = HypergradientDescent("multiplicative", scheduled=scheduled)
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            make_trainer(tmp_path, hd, max_epochs=epochs).fit(module())
        return hd, [line for line in caplog.text.splitlines() if "rates were written" in line]

    with pytest.warns(
        RuntimeWarning, match=r"HypergradientDescent\(SGD\): .*pass HypergradientDescent\(scheduled=True"
    ):
        hd, (remark,) = fit(None)
    assert remark.startswith(f"SGD: rates were written {hd.engines[0].stats.writes} times")
    assert "pass HypergradientDescent(scheduled=True)" in remark
    hd, remarks = fit(True)
    assert remarks == []
    scale = hd.engines[0].scales[0]
    assert scale > 1.5
    assert hd.lrs["lr-SGD"][-1] == pytest.approx(last * scale)


def test_one_correction_in_a_trainer_is_taken_over_in_silence(tmp_path: Path) -> None:
    class Corrected(Reference):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].param_groups[0]["lr"] = 0.001

    hd = HypergradientDescent("additive", hypergrad_lr=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        make_trainer(tmp_path, hd, max_epochs=3).fit(Corrected())
    lrs = hd.lrs["lr-SGD"]
    assert lrs == [0.01] * (len(lrs) // 3) + [0.001] * (len(lrs) // 3 * 2)
