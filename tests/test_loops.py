"""What the loop of a Trainer can do, with HypergradientDescent in it: rates are learned, and nothing else changes."""

import logging
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests import reference
from tests.test_callback import Reference, digits, make_trainer, same, scalars
from tests.test_package import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*"),
    pytest.mark.filterwarnings("ignore:.*Trainer.barebones=True.*"),
    pytest.mark.filterwarnings("ignore:.*anomaly detection.*"),
]


class Validated(Reference):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", reference.torch_loss(self.network, *batch))

    val_dataloader = Reference.train_dataloader


class SelfStopping(Reference):
    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.should_stop = self.global_step == 7


class Reluctant(Reference):
    """Has no loss for every third batch, the first one among them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if batch_idx % 3 else None


class Skipping(Reference):
    """Looks at the gradient before it steps, and does not like that of every third batch."""

    def optimizer_step(self, epoch: Any, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if batch_idx % 3:
            optimizer.step()


class EverySecond(Reference):
    """The recipe of Lightning's documentation for stepping in every second batch."""

    def optimizer_step(self, epoch: Any, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class WarmingUp(Reference):
    """The recipe of Lightning's documentation for a warm-up without a scheduler."""

    def optimizer_step(self, epoch: Any, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.global_step < 5:
            for settings in optimizer.param_groups:
                settings["lr"] = (self.global_step + 1) * 0.01


class Manual(LightningModule):
    """Two optimizers that step in turn, the first twice a batch: the loss of each goes through both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)])
        for p in self.parameters():
            nn.init.constant_(p, 0.1)

    def turns(self) -> list[Any]:
        first, second = self.optimizers()  # type: ignore[attr-defined]
        return [first, first, second]

    def learn(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(reference.torch_loss(nn.Sequential(*self.parts), *batch))
        optimizer.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.turns():
            self.learn(optimizer, batch)

    def configure_optimizers(self) -> Any:
        return [SGD(self.parts[0].parameters(), lr=0.05), Adam(self.parts[1].parameters(), lr=0.01)]

    train_dataloader = Reference.train_dataloader


class Toggling(Manual):
    def learn(self, optimizer: Any, batch: Any) -> None:
        self.toggle_optimizer(optimizer)
        super().learn(optimizer, batch)
        frozen = [not p.requires_grad for p in self.parameters()]
        assert frozen == [p.grad is None for p in self.parameters()]
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)


class WithClosures(Manual):
    def learn(self, optimizer: Any, batch: Any) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(reference.torch_loss(nn.Sequential(*self.parts), *batch))

        optimizer.step(closure=closure)


@dataclass
class Loop:
    """A module, the Trainer's arguments, and the number of steps that each optimizer takes then."""

    module: Callable[[], LightningModule] = Reference
    arguments: dict[str, Any] = field(default_factory=lambda: {"limit_train_batches": 20})
    steps: dict[str, int] = field(default_factory=lambda: {"lr-SGD": 20})


EPOCHS = 20  # of the networks against each other
BY_NORM = {"gradient_clip_val": 0.5}
BY_VALUE = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
TWENTY = {"limit_train_batches": 20}
TWICE_AND_ONCE = {"lr-SGD": 40, "lr-Adam": 20}
LOOPS = {
    "accumulated batches": Loop(arguments={"accumulate_grad_batches": 4, **TWENTY}, steps={"lr-SGD": 5}),
    "accumulated batches, a rest": Loop(arguments={"accumulate_grad_batches": 3, **TWENTY}, steps={"lr-SGD": 7}),
    "accumulated and clipped": Loop(arguments={"accumulate_grad_batches": 3, **BY_NORM, **TWENTY}, steps={"lr-SGD": 7}),
    "clipped by norm": Loop(arguments={**BY_NORM, **TWENTY}),
    "clipped by value": Loop(arguments={**BY_VALUE, **TWENTY}),
    "a part of the batches": Loop(arguments={"limit_train_batches": 0.1, "max_epochs": 2}, steps={"lr-SGD": 40}),
    "fast_dev_run": Loop(arguments={"fast_dev_run": 6}, steps={"lr-SGD": 6}),
    "overfit_batches": Loop(arguments={"overfit_batches": 3, "max_epochs": 4}, steps={"lr-SGD": 12}),
    "barebones": Loop(arguments={"barebones": True, **TWENTY}),
    "validation in between": Loop(Validated, {"val_check_interval": 5, "limit_val_batches": 2, **TWENTY}),
    "detect_anomaly": Loop(arguments={"detect_anomaly": True, **TWENTY}),
    "max_steps": Loop(arguments={"max_steps": 9, "max_epochs": -1}, steps={"lr-SGD": 9}),
    "should_stop": Loop(SelfStopping, steps={"lr-SGD": 7}),
    "batches without a loss": Loop(Reluctant, steps={"lr-SGD": 13}),
    "skipped steps": Loop(Skipping, steps={"lr-SGD": 13}),
    "a step in every second batch": Loop(EverySecond, steps={"lr-SGD": 10}),
    "a warm-up by hand": Loop(WarmingUp),
    "manual, in turn": Loop(Manual, steps=TWICE_AND_ONCE),
    "manual, toggled": Loop(Toggling, steps=TWICE_AND_ONCE),
    "manual, closures that return nothing": Loop(WithClosures, steps=TWICE_AND_ONCE),
}


@pytest.mark.parametrize("name", LOOPS)
def test_every_step_is_counted_and_learned_from_and_only_the_rate_changes(name: str, tmp_path: Path) -> None:
    loop = LOOPS[name]
    plain, standing, learning = (loop.module() for _ in range(3))
    rest, hd = HypergradientDescent("additive", hypergrad_lr=0), HypergradientDescent()
    for module, callbacks in ((plain, []), (standing, [rest]), (learning, [hd])):
        make_trainer(tmp_path, *callbacks, **loop.arguments).fit(module)
    assert same(plain, standing)
    assert {key: len(lrs) for key, lrs in rest.lrs.items()} == loop.steps
    assert {key: len(lrs) for key, lrs in hd.lrs.items()} == loop.steps
    assert all(len(set(lrs)) == len(lrs) for lrs in hd.lrs.values()), "the rate moves in every step"
    assert not same(plain, learning)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clipping", [BY_NORM, BY_VALUE])
def test_the_clipped_gradient_is_seen(clipping: dict[str, Any], accumulate: int, tmp_path: Path) -> None:
    hd = HypergradientDescent()

    class Clipping(Reference):
        before: list[float] = []  # noqa: RUF012
        after: list[float] = []  # noqa: RUF012
        seen: list[float] = []  # noqa: RUF012

        def norm(self) -> float:
            return float(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]).norm())

        def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
            self.before.append(self.norm())
            super().configure_gradient_clipping(*arguments, **named)
            self.after.append(self.norm())

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen += [seen.grad_norm for seen in hd.engines[0].last if seen is not None]

    module = Clipping()
    make_trainer(tmp_path, hd, accumulate_grad_batches=accumulate, limit_train_batches=10, **clipping).fit(module)
    seen = list(dict.fromkeys(module.seen))
    assert seen == pytest.approx(module.after[1:], rel=1e-12)
    assert len(seen) == (9 if accumulate == 1 else 3)
    assert np.mean(seen) < 0.9 * np.mean(module.before)


@pytest.mark.parametrize("module", [Reluctant, Skipping, EverySecond])
def test_batches_without_a_step_leave_no_trace(module: type[Reference], tmp_path: Path) -> None:
    class Shortened(Reference):
        def train_dataloader(self) -> Any:
            x, y = super().train_dataloader().dataset.tensors
            stepping = [i % 2 == 0 if module is EverySecond else i % 3 != 0 for i in range(reference.STEPS)]
            chosen = torch.tensor(stepping).repeat_interleave(reference.BATCH)
            return DataLoader(TensorDataset(x[chosen], y[chosen]), batch_size=reference.BATCH)

    runs = []
    for network in (module(), Shortened()):
        hd = HypergradientDescent(cooldown=0)  # the lengths differ
        make_trainer(tmp_path, hd).fit(network)
        runs.append((hd.lrs, network))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_a_step_in_every_second_batch_is_logged_at_every_interval(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    make_trainer(tmp_path, hd, logger=TensorBoardLogger(tmp_path), log_every_n_steps=10).fit(EverySecond())
    rates = scalars(tmp_path, "hd/lr-SGD")
    scales = scalars(tmp_path, "hd/scale-SGD")
    assert list(scales) == list(scalars(tmp_path, "loss")) == list(range(9, 200, 10))
    assert list(rates) == list(range(0, 200, 2))
    assert list(rates.values()) == pytest.approx([hd.lrs["lr-SGD"][step // 2] for step in rates], rel=1e-6)


def test_a_rest_of_accumulated_batches_is_logged_where_the_loss_is(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    arguments = {"accumulate_grad_batches": 3, "limit_train_batches": 20, "max_epochs": 4, "log_every_n_steps": 2}
    make_trainer(tmp_path, HypergradientDescent(), logger=logger, **arguments).fit(Reference())
    assert list(scalars(tmp_path, "hd/scale-SGD")) == list(scalars(tmp_path, "loss")) == list(range(1, 28, 2))
    assert list(scalars(tmp_path, "hd/lr-SGD")) == list(range(28))


@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
def test_a_warm_up_by_hand_is_gone_on_from(rule: Any, tmp_path: Path) -> None:
    hd = HypergradientDescent(rule, cooldown=0)
    make_trainer(tmp_path, hd, limit_train_batches=20).fit(WarmingUp())
    used = hd.lrs["lr-SGD"]
    largest = 1.1 if rule == "multiplicative" else np.exp(0.5)
    ratios = np.array(used[1:]) / [0.01, 0.02, 0.03, 0.04, 0.05, *used[5:-1]]
    assert np.all(ratios != 1)
    assert np.all((ratios <= largest * (1 + 1e-9)) & (ratios >= 1 / largest * (1 - 0.1)))
    assert used[-1] > 0.05


def test_what_is_frozen_by_a_toggle_is_not_seen(tmp_path: Path) -> None:
    runs = []
    for module in (Manual, Toggling, WithClosures):
        hd, network = HypergradientDescent("multiplicative"), module()
        make_trainer(tmp_path, hd, limit_train_batches=20).fit(network)
        runs.append((hd.lrs, network))
    for lrs, network in runs[1:]:
        assert lrs == runs[0][0]
        assert same(network, runs[0][1])


# ---------------------------------------------------------------------- several fits


@pytest.mark.parametrize("same_trainer", [True, False])
@pytest.mark.parametrize("same_optimizer", [True, False])
def test_a_second_fit_learns_anew_from_what_configure_optimizers_returns(
    same_optimizer: bool, same_trainer: bool, tmp_path: Path
) -> None:
    runs = []
    for callbacks in ([], [HypergradientDescent("additive", hypergrad_lr=0)], [HypergradientDescent("multiplicative")]):
        module = Reference()
        optimizer = Adam(module.parameters(), lr=0.01)
        module.configure = lambda _, kept=optimizer: kept if same_optimizer else Adam([*kept.param_groups[0]["params"]])
        trainer = make_trainer(tmp_path, *callbacks, limit_train_batches=20)
        trainer.fit(module)
        first = [hd.lrs["lr-Adam"] for hd in callbacks]
        if same_trainer:
            trainer.fit_loop.max_epochs = 2
        else:
            trainer = make_trainer(tmp_path, *callbacks, limit_train_batches=20)
        trainer.fit(module)
        runs.append(module)
    assert same(*runs[:2])
    second = callbacks[0].lrs["lr-Adam"]
    assert len(second) == 20
    assert second[0] == (first[0][-1] if same_optimizer else 0.001)
    assert callbacks[0].engines[0].step_count == 20
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_one_callback_serves_one_trainer_after_the_other(tmp_path: Path) -> None:
    hd = HypergradientDescent("multiplicative")
    trainers = []
    for module, names in ((Reference(), {"lr-SGD"}), (Manual(), {"lr-SGD", "lr-Adam"}), (Reference(), {"lr-SGD"})):
        trainers.append(make_trainer(tmp_path, hd, limit_train_batches=5))
        trainers[-1].fit(module)
        assert set(hd.lrs) == names
    for trainer in trainers:
        for optimizer in trainer.optimizers:
            assert not optimizer._optimizer_step_pre_hooks
    assert hd.lrs["lr-SGD"][0] == 0.01


def test_a_fit_that_has_nothing_left_to_do_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    trainer = make_trainer(tmp_path, hd, limit_train_batches=5)
    trainer.fit(Reference())
    trainer.fit(Reference())  # max_epochs is reached
    (optimizer,) = trainer.optimizers
    assert not any(hooks for name, hooks in vars(optimizer).items() if name.endswith("_hooks"))


def test_a_stop_at_a_rate_is_obeyed_at_once(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = bool(trainer.callback_metrics["hd/lr-SGD"] > 1e-3)

    hd = HypergradientDescent()
    make_trainer(tmp_path, hd, Stop()).fit(Reference())
    *before, last = hd.lrs["lr-SGD"]
    assert max(before) <= 1e-3 < last


# ---------------------------------------------------------------------- adversaries


@pytest.fixture
def gan(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What examples/gan.py defines; what it sets for the whole process is set back afterwards."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")
    return runpy.run_path(str(ROOT / "examples" / "gan.py"))


def test_a_gan_learns_with_the_limit_that_the_documentation_names(gan: dict[str, Any], tmp_path: Path) -> None:
    images, _ = digits()
    hd = HypergradientDescent(max_lr=3e-3)
    untrained = gan["distance"](gan["GAN"]().sample(len(images)), images)
    assert gan["fit"]("auto", images, EPOCHS, tmp_path, hd) < 0.8 * untrained
    for name in ("lr-Adam", "lr-Adam-1"):
        assert len(hd.lrs[name]) == EPOCHS * 28
        assert hd.lrs[name][-1] > 1e-3
        assert len(scalars(tmp_path, f"hd/{name}")) == EPOCHS * 28


def test_the_gan_of_the_examples_compares_the_rules(
    gan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gan.py", "--epochs", "1", "--folder", str(tmp_path)])
    gan["main"]()
    lines = [line for line in capsys.readouterr().out.splitlines() if "e-0" in line]
    table = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in lines}
    assert list(table) == ["without", "auto", "auto-clamped", "multiplicative", "multiplicative-clamped"]
    for name, (distance, *rates) in table.items():
        assert 0 < distance < 30
        assert (rates == [2e-4, 2e-4]) == (name == "without")
        assert max(rates) <= {"auto-clamped": 3e-3, "multiplicative-clamped": 1e-3}.get(name, 1)
        assert len(list((tmp_path / "gan" / name).rglob("events.out.tfevents.*"))) == 1
