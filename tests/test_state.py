"""Warm starts: a training begins with what another one has learned, in plain loops and in real Trainers."""

import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_hd import HypergradientDescent, HypergradientLR
from tests import reference
from tests.test_callback import Digits, Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]


class Shuffled(Digits):
    """28 batches an epoch, in an order that follows from a seed."""

    def train_dataloader(self) -> Any:
        return DataLoader(super().train_dataloader().dataset, 64, shuffle=True)

    def loss(self) -> float:
        x, y = self.train_dataloader().dataset.tensors
        with torch.no_grad():
            return nn.functional.cross_entropy(self.network(x), y).item()


def rounds(path: Path, one: bool, make: Callable[[], Shuffled], *hd: HypergradientDescent, seed: int = 0) -> float:
    """The geometric mean of the losses after the last four of 12 fits of one model, or the last six of new models.

    A fit takes 29 steps. Each has a new Trainer and a new optimizer. After one fit, the loss varies by a factor of
    three with the seed and the processor.
    """
    torch.manual_seed(seed)
    module, losses = make(), []
    for i in range(12):
        module = module if one else make()
        torch.manual_seed(seed + i)
        make_trainer(path, *hd).fit(module)
        losses.append(module.loss())
    return float(np.exp(np.mean(np.log(losses[-4 if one else -6 :]))))


@pytest.mark.parametrize("one", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["one model", "new models"])
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(Adam, id="Adam"), pytest.param(partial(SGD, momentum=0.9), id="SGD", marks=pytest.mark.slow)],
)
def test_many_short_fits_arrive(optimizer: Any, one: bool, tmp_path: Path) -> None:
    best_lr = (0.03 if one else 0.05) if optimizer is Adam else 0.2  # of a grid whose rates are a factor of 3 apart
    cooldown: Any = "default" if one else 0.2

    def mean(lr: float = 1e-3, **arguments: Any) -> float:
        """Over two seeds."""
        losses = []
        for seed in (0, 100):
            hd = [HypergradientDescent(**arguments)] if arguments else []
            losses.append(rounds(tmp_path, one, partial(Shuffled, optimizer, lr), *hd, seed=seed))
            if arguments.get("warm_start"):
                assert hd[0].engines[0].step_count == 12 * 29
        return float(np.exp(np.mean(np.log(losses))))

    best, ours, anew = mean(best_lr), mean(warm_start=True, cooldown=cooldown), mean(warm_start=False)
    assert ours < (1.5 if one else 1.1) * best
    assert anew > 2 * best


def test_the_rate_does_not_rise_from_fit_to_fit_until_they_end_badly(tmp_path: Path) -> None:
    constant = rounds(tmp_path, True, partial(Shuffled, SGD, 0.3))
    assert rounds(tmp_path, True, partial(Shuffled, SGD), HypergradientDescent(warm_start=True)) < 1.5 * constant


def fit(path: Path, hd: HypergradientDescent, configure: Callable[[Any], Any], **settings: Any) -> list[float]:
    """The rates of the first group in a fit of the reference problem with a new model."""
    make_trainer(path, hd, **{"limit_train_batches": 40, **settings}).fit(Reference(configure))
    return next(iter(hd.lrs.values()))


def goes_on(first: list[float], second: list[float]) -> bool:
    """Whether rates go on from others. Only a brake of the last step may have ended."""
    return -0.06 < math.log(second[0] / first[-1]) < 0.6


def adam(lr: float = 0.01) -> Callable[[nn.Module], Any]:
    return lambda network: Adam(network.parameters(), lr=lr)


@pytest.mark.parametrize("rule", ["auto", "additive", "multiplicative"])
def test_a_fit_begins_where_the_last_one_has_ended(rule: Any, tmp_path: Path) -> None:
    hd = HypergradientDescent(rule, warm_start=True)
    first, second = fit(tmp_path, hd, adam()), fit(tmp_path, hd, adam(lr=0.5))
    assert goes_on(first, second)
    assert len(second) == 40
    assert hd.engines[0].step_count == 80
    make_trainer(tmp_path, hd, max_steps=0).fit(Reference(adam()))  # a fit without a step learns nothing
    assert goes_on(second, fit(tmp_path, hd, adam()))
    assert fit(tmp_path, HypergradientDescent(rule), adam())[0] == pytest.approx(first[0])


def test_the_state_of_another_process_is_begun_from(tmp_path: Path) -> None:
    hd, other = HypergradientDescent(warm_start=True), HypergradientDescent(warm_start=True)
    fit(tmp_path, hd, adam())
    other.load_state_dict(hd.state_dict())
    assert fit(tmp_path, other, adam()) == fit(tmp_path, hd, adam())


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_that_is_tested_is_not_what_the_next_fit_begins_with(fails: bool, tmp_path: Path) -> None:
    class Tested(Reference):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            if fails:
                raise ZeroDivisionError

        test_dataloader = Reference.train_dataloader

    hd = HypergradientDescent(warm_start=True)
    trainer = make_trainer(tmp_path, hd, limit_train_batches=5)
    trainer.fit(Reference(adam()))
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    second = fit(tmp_path, hd, adam())
    with contextlib.suppress(ZeroDivisionError):
        make_trainer(tmp_path, hd).test(Tested(adam()), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert goes_on(second, fit(tmp_path, hd, adam()))
    assert hd.engines[0].step_count == 85
    state = hd.state_dict()
    hd.load_state_dict(state)  # by the user, between two fits
    fit(tmp_path, hd, adam())
    assert hd.engines[0].step_count == 125


def test_other_optimizers_start_anew_and_it_is_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def groups(network: nn.Module) -> Any:
        return Adam([{"params": [p]} for p in network.parameters()], lr=0.01)

    def sgd(network: nn.Module) -> Any:
        return SGD(network.parameters(), lr=0.01)

    hd = HypergradientDescent(warm_start=True)
    for configure, words in (
        (adam(), ""),
        (sgd, "optimizer='Adam'"),
        (adam(), "'SGD'"),
        (groups, "1 parameter groups"),
    ):
        recwarn.clear()
        rates = fit(tmp_path, hd, configure)
        told = [str(w.message) for w in recwarn if "tuning starts anew" in str(w.message)]
        assert [words in line for line in told] == [True] * bool(words)
        assert rates[0] == fit(tmp_path, HypergradientDescent(), configure)[0]
        assert hd.engines[0].step_count == 40


def test_the_ratios_of_the_groups_are_those_that_are_configured(tmp_path: Path) -> None:
    def with_head(lr: float) -> Callable[[Any], Any]:
        return lambda network: SGD(
            [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": lr}], 0.1
        )

    hd = HypergradientDescent(warm_start=True)
    first = fit(tmp_path, hd, with_head(0.01))
    second = fit(tmp_path, hd, with_head(0.05))
    assert goes_on(first, second)
    assert hd.lrs["lr-SGD/pg2"] == pytest.approx([lr / 2 for lr in second])


@pytest.mark.parametrize("rule", ["auto", "multiplicative"])
def test_schedules_are_those_of_each_fit(rule: Any, tmp_path: Path) -> None:
    def cycle(network: nn.Module) -> Any:
        optimizer = SGD(network.parameters(), lr=0.1)
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=40, cycle_momentum=False)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def constant(network: nn.Module) -> Any:
        optimizer = SGD(network.parameters(), lr=0.1)
        return [optimizer], [LambdaLR(optimizer, lambda _: 1.0)]

    def none(network: nn.Module) -> Any:
        return SGD(network.parameters(), lr=0.1)

    hd = HypergradientDescent(rule, warm_start=True)
    fit(tmp_path, hd, cycle)
    scale = hd.engines[0].scales[0]
    assert fit(tmp_path, hd, cycle)[0] == pytest.approx(0.1 / 25 * scale, rel=0.3), "the scale is what was learned"
    plain = fit(tmp_path, hd, none)
    assert not hd.engines[0].scheduled
    assert goes_on(plain, fit(tmp_path, hd, constant))
    assert hd.engines[0].scheduled


def test_a_fit_that_began_warm_resumes_exactly(tmp_path: Path) -> None:
    runs = []
    for stop in (None, 25):
        hd = HypergradientDescent(warm_start=True, cooldown=0.5)
        fit(tmp_path, hd, adam())
        saver = ModelCheckpoint(tmp_path / str(stop), "{step}", every_n_train_steps=25, save_top_k=-1)
        torch.manual_seed(0)
        make_trainer(tmp_path, hd, saver, limit_train_batches=25, max_epochs=2).fit(Reference(adam()))
        runs.append(hd.lrs["lr-Adam"])
    resumed = HypergradientDescent(cooldown=0.5)
    make_trainer(tmp_path, resumed, limit_train_batches=25, max_epochs=2).fit(
        Reference(adam()), ckpt_path=tmp_path / "25" / "step=25.ckpt"
    )
    assert runs[0] == runs[1]
    assert resumed.lrs["lr-Adam"] == runs[0][25:]
    assert runs[0][-1] < 0.3 * max(runs[0][20:25]), "the cooldown is a part of this fit"


def steps(hd: HypergradientLR, network: nn.Module, optimizer: Optimizer, count: int) -> list[float]:
    rates = []
    for x, y in list(reference.torch_batches())[:count]:
        optimizer.zero_grad()
        loss = reference.torch_loss(network, x, y)
        loss.backward()
        hd.observe(loss)
        optimizer.step()
        rates += hd.lrs
    return rates


def test_a_loop_goes_on_with_a_new_optimizer_of_another_model() -> None:
    networks = [reference.torch_network() for _ in range(2)]
    with torch.no_grad():
        for p in networks[1].parameters():
            p.add_(5 * torch.randn_like(p))
    first, second = (Adam(network.parameters()) for network in networks)
    hd = HypergradientLR(first)
    before = steps(hd, networks[0], first, 40)
    state = hd.state_dict()
    moved = state["view"]["memory"][0]
    new = HypergradientLR(second, total_steps=20, cooldown=0.5)
    new.load_state_dict(state, warm_start=True)
    rates = steps(new, networks[1], second, 1)
    seen = new.last[0]
    assert seen is not None
    assert seen.direction_norm == pytest.approx(float(moved.norm())), "the moves are known, not the places"
    assert seen.move_norm == 0
    rates += steps(new, networks[1], second, 12)
    state = new.state_dict()
    new.detach()
    new = HypergradientLR(second, total_steps=20, cooldown=0.5)
    new.load_state_dict(state)  # of a checkpoint
    rates += steps(new, networks[1], second, 7)
    assert goes_on(before, rates)
    assert new.step_count == 60
    assert np.all(np.diff(rates[10:]) < 0), "the last half of the 20 steps is the cooldown"
    assert rates[-1] < 0.2 * rates[9]


def lose(state: dict[str, Any]) -> None:
    del state["rates"]["trajectories"]


def many(state: dict[str, Any]) -> None:
    state["rates"]["scopes"][0]["lr"] = torch.ones(2)


def limitless(state: dict[str, Any]) -> None:
    state["rates"]["scopes"][0]["peak"] = torch.tensor([math.inf, 1.0])


def huge(state: dict[str, Any]) -> None:
    state["step_count"] = 10**400


def shapeless(state: dict[str, Any]) -> None:
    state["view"]["memory"] = torch.ones(4, 3)


@pytest.mark.parametrize("damage", [lose, many, limitless, huge, shapeless], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("warm_start", [False, True])
def test_a_state_of_something_else_changes_nothing(
    damage: Callable[[dict[str, Any]], None], warm_start: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    rates = []
    for damaged in (False, True):
        network = reference.torch_network()
        optimizer = SGD(network.parameters(), lr=0.1)
        hd = HypergradientLR(optimizer)
        steps(hd, network, optimizer, 5)
        state = hd.state_dict()
        steps(hd, network, optimizer, 5)
        if damaged:
            damage(state)
            with pytest.raises(ValueError, match="damaged"):
                hd.load_state_dict(state, warm_start=warm_start)
            assert hd.step_count == 10
        rates.append(steps(hd, network, optimizer, 10))
    assert rates[0] == rates[1]
