"""The constant rate that a trajectory suggests: by hand, from engines and callbacks, and in training."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from lightning_hd import HypergradientDescent, HypergradientLR
from lightning_hd.checks import check_fields, save_fields
from lightning_hd.engine.rates import Trajectory
from lightning_hd.engine.suggestion import constant_rate
from tests.benchmarks import tasks, training, tuners
from tests.benchmarks.tuners import constant
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.mark.parametrize("steps", [1, 2, 7, 256, 257, 5000])
def test_it_is_a_part_of_a_high_rate_of_the_first_half_and_few_points_suffice(steps: int) -> None:
    trajectory = Trajectory()
    assert constant_rate(trajectory.points) is None
    rates = np.exp(np.sin(np.arange(steps) / steps * 9)).tolist()
    for lr in rates:
        trajectory.add(lr)
    assert len(trajectory.points) <= 256
    first = rates[: (steps + 1) // 2]
    expected = max(0.6 * np.quantile(first, 0.8), min(first))
    assert constant_rate(trajectory.points) == pytest.approx(expected, rel=1e-12 if steps <= 256 else 0.02)
    again = check_fields(Trajectory, save_fields(trajectory))
    assert again == trajectory


def test_an_engine_suggests_one_rate_or_one_for_each_group_and_goes_on_from_a_checkpoint() -> None:
    def engine(*groups: dict[str, Any], **arguments: Any) -> HypergradientLR:
        own = [{"params": [nn.Parameter(torch.ones(3))], **settings} for settings in groups]
        return HypergradientLR(SGD(own, lr=0.01), **arguments)

    def train(hd: HypergradientLR, steps: int) -> None:
        for _ in range(steps):
            hd._optimizer.zero_grad()
            sum((p**2).sum() for group in hd._optimizer.param_groups for p in group["params"]).backward()  # type: ignore[union-attr]
            hd._optimizer.step()

    one = engine({}, rule="additive", hypergrad_lr=1e-4)
    with pytest.raises(RuntimeError, match=r"HypergradientLR\(SGD\): no suggestion before a step has moved"):
        one.suggestion()
    train(one, 20)
    lr = one.suggestion()
    assert isinstance(lr, float)
    assert 0.6 * 0.01 < lr < 0.6 * one.lrs[0]
    resumed = engine({}, rule="additive", hypergrad_lr=1e-4)
    resumed.load_state_dict(one.state_dict())
    assert resumed.suggestion() == lr

    for scope in ("global", "group"):
        several = engine({"name": "body"}, {"name": "head", "lr": 0.03}, rule="additive", scope=scope)
        train(several, 20)
        with pytest.raises(ValueError, match=r"call suggestion\(by_group=True\)"):
            several.suggestion()
        lrs = several.suggestion(by_group=True)
        assert list(lrs) == ["SGD/body", "SGD/head"]
        ratio = lrs["SGD/head"] / lrs["SGD/body"]
        assert ratio == pytest.approx(3, rel=1e-9) if scope == "global" else 1 < ratio < 2
    frozen = engine({}, {"lr": 0.0}, rule="additive", scope="group", min_lr=1e-4)
    train(frozen, 20)
    lrs = frozen.suggestion(by_group=True)
    assert lrs["SGD/pg1"] > 0 == lrs["SGD/pg2"]

    ending = engine({}, {"lr": 1e-4}, rule="additive", hypergrad_lr=1e-9)
    scheduler = LambdaLR(ending._optimizer, lambda step: max(0.0, 1 - step / 19))
    for _ in range(20):
        train(ending, 1)
        scheduler.step()
    lrs = ending.suggestion(by_group=True)
    assert lrs["SGD/pg2"] == pytest.approx(0.01 * lrs["SGD/pg1"])

    held = engine({}, rule="additive", hypergrad_lr=1.0, max_lr=0.02)
    train(held, 20)
    assert held.suggestion() == pytest.approx(0.6 * 0.02)


@pytest.mark.parametrize("wrong", [2, 3])
def test_a_suggestion_of_a_run_with_many_steps_that_were_not_finite_comes_with_a_warning(wrong: int) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SGD([w], lr=0.01)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.0)
    for step in range(40):
        w.grad = torch.full_like(w, math.nan if 20 <= step < 20 + wrong else 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        with torch.no_grad():
            w.nan_to_num_(1.0)
    count = hd.stats.nonfinite_steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert hd.suggestion() == hd.suggestion() == pytest.approx(0.01), "it never moved"
    told = [str(warning.message) for warning in caught]
    says = f"HypergradientLR(SGD): the suggested rate says little, because {count} of 40 steps were not finite"
    assert told == [says] * (count > 2)
    assert count > 2 or wrong == 2


def test_a_checkpoint_brings_the_suggestion_of_its_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 20}
    before, finished, tested = (HypergradientDescent() for _ in range(3))
    trainer = make_trainer(tmp_path, before, **settings)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    make_trainer(tmp_path, finished, **settings).fit(Reference(), ckpt_path=tmp_path / "last.ckpt")
    assert finished.engines == []
    tested.load_state_dict(torch.load(tmp_path / "last.ckpt")["callbacks"]["HypergradientDescent"])
    assert before.suggestion() == finished.suggestion() == tested.suggestion()
    make_trainer(tmp_path, finished, limit_train_batches=40).fit(Reference())
    assert finished.suggestion() != before.suggestion()


def test_a_callback_names_the_groups_and_the_cooldown_does_not_count(tmp_path: Path) -> None:
    def configure(network: nn.Module) -> Any:
        first, *others = network.parameters()
        return Adam([{"params": [first], "lr": 0.01}, {"params": others, "lr": 0.02, "name": "head"}])

    hd = HypergradientDescent()
    with pytest.raises(RuntimeError, match="no step of an optimizer was tuned yet"):
        hd.suggestion()
    make_trainer(tmp_path, hd, logger=CSVLogger(tmp_path)).fit(Reference(configure))
    lrs = hd.suggestion(by_group=True)
    assert list(lrs) == ["Adam/pg1", "Adam/head"]
    assert lrs["Adam/head"] == pytest.approx(2 * lrs["Adam/pg1"])
    falling, steady = (
        HypergradientDescent("additive", hypergrad_lr=0.0, cooldown=1.0),
        HypergradientDescent("additive", hypergrad_lr=0.0),
    )
    for callback in (falling, steady):
        make_trainer(tmp_path, callback).fit(Reference())
    assert falling.lrs["lr-SGD"][-1] < 0.1 * steady.lrs["lr-SGD"][-1]
    assert falling.suggestion() == steady.suggestion() == falling.engines[0].suggestion()


def test_training_with_it_is_as_good_as_with_the_best_rate_of_a_grid() -> None:
    """One task; tests/benchmarks/suggestion.py has them all. The best of a grid from 0.03 to 3 is its last rate."""

    def loss(rate: float) -> float:
        problem = tasks.build("compress", 0, Path())
        return training.train(problem, tuners.methods("auto")["constant"], "SGD", rate, 0.0, 400).train_loss

    problem = tasks.build("compress", 0, Path())
    optimizer = constant(problem.network, "SGD", 1e-3, 0.0, 400).optimizer
    hd = HypergradientLR(optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        problem.train_loss().backward()
        optimizer.step()
    suggested = hd.suggestion()
    assert isinstance(suggested, float)
    assert loss(suggested) < 1.1 * loss(tuners.grid_rate(1))
