"""The cooldown at the end: over the steps that the training takes, as far as that is known, and however it changes."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from lightning_hd import Auto, HypergradientDescent, HypergradientLR
from lightning_hd.rules import Context
from lightning_hd.trainer.attachment import TrainerEngine
from tests.benchmarks import tasks, training, tuners
from tests.test_callback import Reference, make_trainer
from tests.test_loops import EverySecond, Reluctant, Skipping

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def fall(over: float) -> float:
    """What is left of the rate once this part of the cooldown is over."""
    return 1 - math.sqrt(over)


def cools_down(lrs: list[float], steps: int, part: float = 0.2) -> None:
    """With a rate that is not tuned, it falls over the last part of so many steps, and not before."""
    length = part * steps
    expected = [0.01 * fall(max(0.0, step - steps + length) / length) for step in range(steps)]
    assert lrs == pytest.approx(expected[-len(lrs) :])


class Growing(Reference):
    """In each epoch there is more data."""

    def train_dataloader(self) -> Any:
        data = super().train_dataloader().dataset
        count = 160 * (1 + self.trainer.current_epoch)
        return DataLoader(torch.utils.data.Subset(data, range(count)), batch_size=16)


class Longer(Callback):
    """Makes the training longer in its second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.fit_loop.max_epochs = 6


@pytest.mark.parametrize(
    ("rule", "falls"),
    [("auto", True), (Auto(start="configured"), True), ("additive", False), ("multiplicative", False)],
)
def test_the_default_is_a_fifth_with_auto_and_none_with_the_paper_s_rules(rule: Any, falls: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    hd = HypergradientLR(SGD([p], lr=0.1), rule, total_steps=100)
    lrs: list[float] = []
    for _ in range(100):
        p.grad = torch.randn(3, generator=torch.Generator().manual_seed(len(lrs)))
        hd._optimizer.step()
        lrs += hd.lrs
    assert (lrs[-1] < 0.1 * lrs[79]) == falls


@pytest.mark.parametrize(
    ("module", "others", "arguments", "steps"),
    [
        (Reference, [], {"max_epochs": 4, "limit_train_batches": 20}, 80),
        (Reference, [], {"max_epochs": 4, "limit_train_batches": 20, "max_steps": 50}, 50),
        (Reference, [Longer()], {"max_epochs": 3, "limit_train_batches": 20}, 120),
        (Reference, [GradientAccumulationScheduler({0: 4, 1: 1})], {"max_epochs": 4, "limit_train_batches": 20}, 65),
        (Reference, [GradientAccumulationScheduler({0: 1, 1: 2})], {"max_epochs": 4, "limit_train_batches": 20}, 50),
        (Reference, [GradientAccumulationScheduler({0: 4, 9: 1})], {"max_epochs": 10, "limit_train_batches": 20}, 65),
        (Reference, [GradientAccumulationScheduler({2: 3, 4: 2})], {"max_epochs": 5, "limit_train_batches": 20}, 64),
        (Reference, [GradientAccumulationScheduler({8: 2})], {"max_epochs": 5, "limit_train_batches": 20}, 100),
    ],
)
def test_a_training_ends_in_a_cooldown(
    module: Any, others: list[Any], arguments: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, cooldown=0.2)
    make_trainer(tmp_path, hd, *others, **arguments).fit(module())
    cools_down(hd.lrs["lr-SGD"], steps)


def test_a_training_on_more_and_more_data_cools_down_at_its_end_only(tmp_path: Path) -> None:
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, cooldown=0.2)
    make_trainer(tmp_path, hd, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(Growing())
    lrs = hd.lrs["lr-SGD"]
    assert len(lrs) == 10 + 20 + 30 + 40
    assert set(lrs[:60]) == {0.01}
    assert lrs[-1] < 0.002
    assert sorted(lrs[60:], reverse=True) == lrs[60:]


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*")
@pytest.mark.parametrize(
    ("module", "epochs", "steps"), [(Reluctant, 4, 52), (Skipping, 4, 52), (EverySecond, 4, 40), (EverySecond, 1, 10)]
)
def test_the_cooldown_arrives_also_where_batches_are_skipped(
    module: type[Reference], epochs: int, steps: int, tmp_path: Path
) -> None:
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, cooldown=0.5)
    make_trainer(tmp_path, hd, max_epochs=epochs, limit_train_batches=20).fit(module())
    lrs = hd.lrs["lr-SGD"]
    assert len(lrs) == steps
    assert set(lrs[: steps // 2]) == {0.01}
    assert sorted(lrs, reverse=True) == lrs
    assert lrs[-1] < 0.01 * fall(1 - 2.1 / (0.5 * steps))  # two batches were left


@pytest.mark.parametrize("former", ["none", "of another rule"])
def test_tuning_that_starts_in_the_middle_cools_down_at_the_end(former: str, tmp_path: Path) -> None:
    before = [] if former == "none" else [HypergradientDescent("multiplicative", hypergrad_lr=0.0)]
    trainer = make_trainer(tmp_path, *before, max_epochs=2, limit_train_batches=20)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, cooldown=0.2, on_mismatch="restart")
    with pytest.warns(UserWarning, match="was written without it|starts anew"):
        make_trainer(tmp_path, hd, max_epochs=5, limit_train_batches=20).fit(
            Reference(), ckpt_path=tmp_path / "last.ckpt"
        )
    assert len(hd.lrs["lr-SGD"]) == 60
    # a fifth of the steps that are left, or of those that are counted
    assert hd.lrs["lr-SGD"][-1] == pytest.approx(0.01 * fall(11 / 12))
    assert set(hd.lrs["lr-SGD"][:48]) == {0.01}


def test_steps_after_the_end_are_warned_of_once() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SGD([w], lr=0.01)
    hd = TrainerEngine(optimizer, "additive", hypergrad_lr=0.0, total_steps=10, cooldown=0.5)

    def train(steps: int) -> None:
        for _ in range(steps):
            w.grad = torch.ones(3)
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="goes on after the 10 steps that it was to take") as caught:
        train(15)
    assert len(caught) == 1
    assert hd.lrs == [pytest.approx(0.01 * fall(4 / 5))]
    hd.expect(85)
    train(1)
    assert hd.lrs == [0.01]


def test_a_cooldown_without_a_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cooldown=0.5 has no effect without total_steps"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(3))], lr=0.1), cooldown=0.5)


@pytest.mark.parametrize("rule", ["auto", "additive"])
@pytest.mark.parametrize("cooldown", ["default", 0.5])
@pytest.mark.parametrize("estimate", [0, -1, 7, 100, math.inf])
def test_any_number_of_steps_that_the_trainer_estimates_will_do(
    estimate: float, cooldown: Any, rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is smaller than the number of steps taken, and it changes between two fits."""
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", property(lambda _: estimate))
    monkeypatch.setattr(Trainer, "max_epochs", property(lambda _: 1))
    trainer = make_trainer(tmp_path, HypergradientDescent(rule, cooldown=cooldown), limit_train_batches=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*goes on after the .* steps that it was to take.*")
        trainer.fit(Reference())
        estimate = 3
        trainer.fit_loop.max_epochs = 2
        trainer.fit(Reference())


@pytest.mark.filterwarnings("ignore:.*goes on after the .* steps that it was to take.*")
@pytest.mark.parametrize("cooldown", ["default", 0.5])
def test_a_fit_that_has_no_step_left_ends_in_peace(cooldown: Any, tmp_path: Path) -> None:
    class Fails(Reference):
        """An error in the last validation ends the training, after a checkpoint of all steps was written."""

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

        def validation_step(self, *_: Any) -> None:
            if self.trainer.global_step:
                self.trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise ArithmeticError

    settings: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 20, "limit_val_batches": 1}
    with pytest.raises(ArithmeticError):
        make_trainer(tmp_path, HypergradientDescent(cooldown=cooldown), **settings).fit(Fails())
    tuned = make_trainer(tmp_path, HypergradientDescent(cooldown=cooldown), **settings)
    plain = make_trainer(tmp_path, **settings)
    for trainer in (tuned, plain):
        trainer.fit(Reference(), ckpt_path=tmp_path / "last.ckpt")
    assert tuned.global_step == plain.global_step


seen: list[float] = []


class Seeing(Auto):
    """Notes the falls that are still to come, of which it is told."""

    def discount(self, lr: float, context: Context) -> float:
        seen.append(context.cooldown)
        return super().discount(lr, context)


class Scheduled(Reference):
    """The factor of the rate is a function of the number of steps."""

    def __init__(self, factor: Callable[[int], float]) -> None:
        super().__init__()
        self.factor = factor

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": lr_scheduler.LambdaLR(optimizer, self.factor), "interval": "step"}]


@pytest.mark.parametrize("fall", [0.0, 1e-6, 0.01])
def test_a_schedule_that_has_begun_to_fall_counts_as_a_cooldown_that_ends_with_the_training(
    fall: float, tmp_path: Path
) -> None:
    """Rates rise over 5 steps, stay for 5, and fall to the end."""
    seen.clear()
    module = Scheduled(lambda t: min(1.0, (t + 1) / 5) - fall * max(0, t - 9))
    make_trainer(tmp_path, HypergradientDescent(Seeing()), max_epochs=3, limit_train_batches=20).fit(module)
    begins = 10 if fall == 0.01 else math.inf
    assert seen == [60.0 - step if step >= begins else 0.0 for step in range(60)]


def test_it_is_as_good_as_the_best_rate_under_the_same_schedule() -> None:
    """Noise decides here. Without the length of the run, the loss is four times as high.

    Of 0.03, 0.1 and 0.3, the second is the best.
    """

    def loss(method: str, rate: float) -> float:
        problem = tasks.build("quadratic", 0, Path())
        return training.train(problem, tuners.methods("auto")[method], "Nesterov", rate, 0.0, 2000).train_loss

    assert loss("auto+cosine", 1e-3) <= 1.1 * loss("cosine", 0.1)


@pytest.mark.parametrize("scheduled", [0.0, 1.0])
def test_a_schedule_may_be_at_zero_when_it_begins_or_ends(scheduled: float, tmp_path: Path) -> None:
    hd, module = HypergradientDescent(), Scheduled(lambda t: scheduled if t < 30 else 1 - scheduled)
    make_trainer(tmp_path, hd, max_epochs=3, limit_train_batches=20).fit(module)
    lrs = hd.lrs["lr-SGD"]
    assert all(math.isfinite(lr) and (lr > 0) == ((t < 30) == bool(scheduled)) for t, lr in enumerate(lrs))
