"""HypergradientDescent in real Trainers, on the reference problem and on scikit-learn's digits."""

import copy
import csv
import functools
import logging
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import Additive, HypergradientDescent
from tests import reference
from tests.pairs import by_turns
from tests.test_hypergradient import PAPER

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Reference(LightningModule):
    """The reference problem as a LightningModule."""

    def __init__(self, configure: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.network = reference.torch_network()
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = reference.torch_loss(self.network, *batch)
        if self.trainer.loggers:  # it takes a third of a step
            self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self.network) if self.configure else SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        x, y = (torch.cat(parts) for parts in zip(*reference.torch_batches(), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=reference.BATCH)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The images and the labels of scikit-learn's digits. They must not be changed."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


class Digits(LightningModule):
    """A small classifier of scikit-learn's digits."""

    def __init__(self, optimizer: type[Optimizer] = SGD, lr: float = 1e-5, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.make = lambda: optimizer(self.parameters(), lr=lr, **settings)  # type: ignore[call-arg]
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*digits()), batch_size=64)


def make_trainer(path: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **arguments})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def events(path: Path) -> Any:
    """What is in the event files under a folder."""
    (folder,) = {file.parent for file in path.rglob("events.out.tfevents.*")}
    # Files of one second are read in the order of a count in their names, and "10" comes before "9". So keep all steps.
    return EventAccumulator(str(folder), purge_orphaned_data=False).Reload()


def scalars(path: Path, tag: str) -> dict[int, float]:
    """Steps and values of a tag in the event files under a folder."""
    return {event.step: event.value for event in sorted(events(path).Scalars(tag), key=lambda event: event.step)}


LOGGED = ("lr", "log10_lr", "scale", "log10_scale", "hypergradient", "cosine", "mean_cosine")
"""What is in event files, backoffs and schedules aside."""


def tags(path: Path) -> set[str]:
    return {tag for tag in events(path).Tags()["scalars"] if tag.startswith("hd/")}


class Observer(Callback):
    """Reads the engines of another callback at every optimizer step."""

    def __init__(self, hd: HypergradientDescent) -> None:
        self.hd = hd
        self.values: list[float] = []
        self.cosines: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        (seen,) = self.hd.engines[0].last
        self.values.append(math.nan if seen is None else seen.hypergradient)
        self.cosines.append(math.nan if seen is None else seen.cosine)


class AfterOneEpoch(Callback):
    """Stops a run early; unlike a smaller `max_epochs`, this leaves its planned length as it is."""

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


# ---------------------------------------------------------------------- the paper, through a Trainer


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize("method", PAPER)
def test_trajectory_is_the_papers(method: str, rule: Any, tmp_path: Path) -> None:
    cls, settings, beta = PAPER[method]
    beta = beta if rule == "additive" else 0.02
    lrs, parameters = reference.train(method, rule, 0.01, beta, settings, steps=60)
    module = Reference(lambda network: cls(network.parameters(), lr=0.01, **settings))  # type: ignore[arg-type]
    hd = HypergradientDescent(rule, hypergrad_lr=beta, min_lr=None)
    make_trainer(tmp_path, hd, precision="64-true", limit_train_batches=60).fit(module)
    np.testing.assert_allclose(hd.lrs[f"lr-{cls.__name__}"], lrs, rtol=1e-10)
    for p, expected in zip(module.parameters(), parameters, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_hypergrad_lr_training_is_the_same_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    plain, attached = Digits(Adam, 1e-3), Digits(Adam, 1e-3)
    for module, callbacks in ((plain, []), (attached, [HypergradientDescent(rule="additive", hypergrad_lr=0)])):
        make_trainer(tmp_path, *callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=0.5, max_epochs=2).fit(
            module
        )
    assert same(plain, attached)
    assert plain.losses == attached.losses


@pytest.mark.parametrize(
    ("rule", "optimizer", "settings"),
    [
        ("additive", SGD, {"momentum": 0.9}),
        pytest.param("multiplicative", SGD, {}, marks=pytest.mark.slow),
        pytest.param("multiplicative", SGD, {"momentum": 0.9}, marks=pytest.mark.slow),
        ("multiplicative", Adam, {}),
        ("auto", SGD, {"momentum": 0.9}),
        pytest.param("auto", Adam, {}, marks=pytest.mark.slow),
    ],
)
def test_a_rate_that_is_far_too_small_is_repaired(
    tmp_path: Path, rule: Any, optimizer: Any, settings: dict[str, Any]
) -> None:
    plain, tuned = (Digits(optimizer, 1e-5, **settings) for _ in range(2))
    alone = plain.make()
    for _ in range(20):
        for batch in plain.train_dataloader():
            alone.zero_grad()
            plain.training_step(batch, 0).backward()
            alone.step()
    make_trainer(tmp_path, HypergradientDescent(rule), max_epochs=20).fit(tuned)
    assert np.mean(tuned.losses[-20:]) < 0.2 < 2.0 < np.mean(plain.losses[-20:])


# ---------------------------------------------------------------------- what is logged


def test_tags_steps_and_values_in_the_event_file(tmp_path: Path) -> None:
    hd = HypergradientDescent(rule="additive", hypergrad_lr=1e-3)
    observer = Observer(hd)
    make_trainer(
        tmp_path, hd, observer, logger=TensorBoardLogger(tmp_path), log_every_n_steps=7, precision="64-true"
    ).fit(Reference())
    assert tags(tmp_path) == {f"hd/{what}-SGD" for what in LOGGED}
    scales = scalars(tmp_path, "hd/scale-SGD")
    assert list(scales) == list(scalars(tmp_path, "loss")) == list(range(6, 200, 7))
    history = hd.lrs["lr-SGD"]
    assert len(history) == 200
    assert scalars(tmp_path, "hd/lr-SGD") == pytest.approx(dict(enumerate(history)), rel=1e-6)  # of every step
    logarithms = dict(enumerate(map(math.log10, history)))
    assert scalars(tmp_path, "hd/log10_lr-SGD") == pytest.approx(logarithms, rel=1e-6)
    values = scalars(tmp_path, "hd/hypergradient-SGD")
    cosines = scalars(tmp_path, "hd/cosine-SGD")
    running = scalars(tmp_path, "hd/mean_cosine-SGD")
    for step, scale in scales.items():
        assert scale == pytest.approx(history[step] / 0.01, rel=1e-6)
        window, last = slice(step - 6, step + 1), slice(max(step - 99, 0), step + 1)
        assert values[step] == pytest.approx(np.nanmean(observer.values[window]), rel=1e-5)
        assert cosines[step] == pytest.approx(np.nanmean(observer.cosines[window]), rel=1e-5)
        assert running[step] == pytest.approx(np.nanmean(observer.cosines[last]), rel=1e-5)


def test_means_are_as_exact_in_any_precision(tmp_path: Path) -> None:
    class Half(Alternating):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step([x.bfloat16() for x in batch], batch_idx)

    hd = HypergradientDescent("additive", hypergrad_lr=0)
    seen: list[float] = []

    class Observe(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.extend(x.hypergradient for x in hd.engines[0].last if x is not None)

    logger = TensorBoardLogger(tmp_path)
    settings: dict[str, Any] = {"limit_train_batches": 60, "log_every_n_steps": 60, "precision": "bf16-true"}
    make_trainer(tmp_path, hd, Observe(), logger=logger, **settings).fit(Half())
    assert len(seen) == 59
    assert scalars(tmp_path, "hd/hypergradient-Adam") == {59: pytest.approx(np.mean(seen), rel=1e-6)}


@pytest.mark.parametrize(("every", "steps"), [(50, range(49, 100, 50)), (0, []), (None, range(9, 100, 10))])
def test_the_logging_interval(tmp_path: Path, every: int | None, steps: Sequence[int]) -> None:
    hd, logger = HypergradientDescent(log_every_n_steps=every), TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, hd, logger=logger, log_every_n_steps=10, limit_train_batches=100).fit(Reference())
    if len(steps):
        assert list(scalars(tmp_path, "hd/scale-SGD")) == list(steps)
        assert list(scalars(tmp_path, "hd/lr-SGD")) == list(range(100))
    else:
        assert tags(tmp_path) == set()


def test_every_logger_of_the_trainer_is_served(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    settings: dict[str, Any] = {"log_every_n_steps": 10, "limit_train_batches": 40}
    make_trainer(tmp_path, HypergradientDescent(), logger=loggers, **settings).fit(Reference())
    assert len(scalars(tmp_path / "tb", "hd/scale-SGD")) == 4
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["hd/lr-SGD"]]
    assert [int(row["step"]) for row in rows] == list(range(9, 40, 10))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    settings: dict[str, Any] = {"log_every_n_steps": 2, "accumulate_grad_batches": 5, "limit_train_batches": 60}
    make_trainer(tmp_path, hd, logger=TensorBoardLogger(tmp_path), **settings).fit(Reference())
    assert len(hd.lrs["lr-SGD"]) == 12
    assert list(scalars(tmp_path, "hd/scale-SGD")) == list(scalars(tmp_path, "loss")) == list(range(1, 12, 2))
    assert list(scalars(tmp_path, "hd/lr-SGD")) == list(range(12))


def test_manual_optimization_that_steps_now_and_then_is_logged_at_every_interval(tmp_path: Path) -> None:
    class NowAndThen(Alternating):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 4 == 0:
                super().training_step(batch, batch_idx)

    settings: dict[str, Any] = {"log_every_n_steps": 10, "limit_train_batches": 60}
    make_trainer(tmp_path, HypergradientDescent(), logger=TensorBoardLogger(tmp_path), **settings).fit(NowAndThen())
    assert list(scalars(tmp_path, "hd/scale-Adam")) == list(range(9, 60, 10))
    assert list(scalars(tmp_path, "hd/lr-Adam")) == list(range(0, 60, 4))


def test_names_of_groups_follow_the_learning_rate_monitor(tmp_path: Path) -> None:
    def configure(network: Any) -> Optimizer:
        p = list(network.parameters())
        return Adam([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02, "name": "head"}])

    hd, monitor = HypergradientDescent(rule="additive", scope="group"), LearningRateMonitor()
    settings: dict[str, Any] = {"log_every_n_steps": 20, "limit_train_batches": 60}
    make_trainer(tmp_path, hd, monitor, logger=TensorBoardLogger(tmp_path), **settings).fit(Reference(configure))
    assert tags(tmp_path) == {f"hd/{what}-Adam/{group}" for what in LOGGED for group in ("pg1", "head")}
    assert set(hd.lrs) == set(monitor.lrs) == {"lr-Adam/pg1", "lr-Adam/head"}
    # The monitor reads before a batch what the step before it used; first of all, at the start of the epoch.
    assert monitor.lrs["lr-Adam/head"][1:] == [hd.lrs["lr-Adam/head"][step - 1] for step in range(19, 60, 20)]


def test_rates_are_in_callback_metrics_and_in_the_progress_bar_if_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        hd = HypergradientDescent(prog_bar=asked)
        trainer = make_trainer(tmp_path, hd, limit_train_batches=20)
        trainer.fit(Reference())
        assert float(trainer.callback_metrics["hd/lr-SGD"]) == pytest.approx(hd.lrs["lr-SGD"][-1])
        assert ("hd/lr-SGD" in trainer.progress_bar_metrics) == asked


def test_without_a_logger_it_says_so_once_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hd = HypergradientDescent()
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, hd, limit_train_batches=60).fit(Reference())
    assert len([r for r in caplog.records if "no logger" in r.getMessage()]) == 1
    assert len(hd.lrs["lr-SGD"]) == 60
    assert max(hd.lrs["lr-SGD"]) > 0.011


def test_numbers_that_are_not_finite_are_not_averaged(tmp_path: Path) -> None:
    class Spoiled(Reference):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            if self.global_step == 12:
                next(self.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            for p in self.parameters():  # what SGD has made of it
                p.data.nan_to_num_(0.0)

    hd = HypergradientDescent(rule="additive")
    settings: dict[str, Any] = {"log_every_n_steps": 5, "limit_train_batches": 40}
    with pytest.warns(RuntimeWarning, match="not a finite number"):
        make_trainer(tmp_path, hd, logger=TensorBoardLogger(tmp_path), **settings).fit(Spoiled())
    assert hd.engines[0].stats.nonfinite_steps == 2  # the gradient, and the direction that it became
    for what in ("lr", "hypergradient", "cosine"):
        values = scalars(tmp_path, f"hd/{what}-SGD")
        assert len(values) == (40 if what == "lr" else 8)
        assert all(map(math.isfinite, values.values()))


# ---------------------------------------------------------------------- optimizers and loops


class Alternating(LightningModule):
    """Three optimizers in manual optimization; the second steps twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList(reference.torch_network() for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            for _ in range(2 if i == 1 else 1):
                optimizer.zero_grad()
                loss = reference.torch_loss(self.parts[i], *batch)
                self.manual_backward(loss)
                optimizer.step()
        if self.trainer.loggers:
            self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [cls(part.parameters(), lr=0.01) for cls, part in zip((Adam, SGD, Adam), self.parts, strict=True)]  # type: ignore[attr-defined]

    train_dataloader = Reference.train_dataloader


def test_several_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    hd = HypergradientDescent("multiplicative", hypergrad_lr=0.02)
    module = Alternating()
    settings: dict[str, Any] = {"log_every_n_steps": 10, "limit_train_batches": 60}
    make_trainer(tmp_path, hd, logger=TensorBoardLogger(tmp_path), **settings).fit(module)
    assert {name: len(lrs) for name, lrs in hd.lrs.items()} == {"lr-Adam": 60, "lr-SGD": 120, "lr-Adam-1": 60}
    assert hd.lrs["lr-Adam"] == hd.lrs["lr-Adam-1"]  # the same network and data
    assert list(scalars(tmp_path, "hd/scale-Adam-1")) == list(scalars(tmp_path, "loss"))
    lrs, _ = reference.train("adam", "multiplicative", 0.01, 0.02, steps=60)
    np.testing.assert_allclose(hd.lrs["lr-Adam"], lrs, rtol=1e-10)


def test_two_fits_start_anew(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    runs = []
    for _ in range(2):
        make_trainer(tmp_path, hd, max_steps=50).fit(Reference())
        runs.append(hd.lrs)
    assert runs[0] == runs[1]
    assert len(runs[0]["lr-SGD"]) == 50


# ---------------------------------------------------------------------- detaching


class Interrupting(Reference):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 5:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [None, ValueError("stop"), KeyboardInterrupt()])
def test_the_optimizer_is_released(tmp_path: Path, error: BaseException | None) -> None:
    hd = HypergradientDescent()
    module = Reference() if error is None else Interrupting(error)
    trainer = make_trainer(tmp_path, hd, limit_train_batches=20)
    if error is None:
        trainer.fit(module)
    else:
        with pytest.raises((ValueError, SystemExit)):
            trainer.fit(module)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    reached = hd.lrs["lr-SGD"][-1]
    assert optimizer.param_groups[0]["lr"] == reached != 0.01
    assert len(hd.lrs["lr-SGD"]) == (20 if error is None else 5)
    before = copy.deepcopy(hd.lrs)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == reached
    assert hd.lrs == before


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("case", "when"),
    by_turns(
        [*((method, "additive") for method in PAPER), ("sgdn", "auto"), ("adam", "auto")],
        ("during training", "after training"),
        every=2,
    ),
)
def test_resuming_is_exact(tmp_path: Path, case: tuple[str, Any], when: str) -> None:
    method, rule = case
    cls, settings, beta = PAPER[method]

    def module() -> Reference:
        return Reference(lambda network: cls(network.parameters(), lr=0.01, **settings))  # type: ignore[arg-type]

    def callback() -> HypergradientDescent:
        return HypergradientDescent(rule, hypergrad_lr=beta if rule == "additive" else None)

    whole, hd = module(), callback()
    make_trainer(tmp_path, hd, max_epochs=2, limit_train_batches=25).fit(whole)
    if when == "after training":
        trainer = make_trainer(tmp_path, callback(), AfterOneEpoch(), max_epochs=2, limit_train_batches=25)
        trainer.fit(module())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    else:
        saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
        make_trainer(tmp_path, callback(), saver, AfterOneEpoch(), max_epochs=2, limit_train_batches=25).fit(module())
    resumed, again = module(), callback()
    make_trainer(tmp_path, again, max_epochs=2, limit_train_batches=25).fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    name = f"lr-{cls.__name__}"
    assert again.lrs[name] == hd.lrs[name][25:]
    assert same(whole, resumed)


def test_a_checkpoint_is_of_plain_numbers_and_serves_with_and_without_the_callback(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 20}
    trainer = make_trainer(tmp_path, HypergradientDescent(), **settings)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    checkpoint = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["HypergradientDescent"]["optimizers"][0]["step_count"] == 20
    without = make_trainer(tmp_path, max_epochs=2, **settings)
    with pytest.warns(UserWarning, match=r"add the following callbacks: \['HypergradientDescent'\]"):
        without.fit(Reference(), ckpt_path=tmp_path / "with.ckpt")
    without.save_checkpoint(tmp_path / "without.ckpt")
    hd = HypergradientDescent()
    make_trainer(tmp_path, hd, max_epochs=3, **settings).fit(Reference(), ckpt_path=tmp_path / "without.ckpt")
    assert len(hd.lrs["lr-SGD"]) == 20


def test_a_checkpoint_of_another_rule_or_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, HypergradientDescent("additive"), limit_train_batches=20)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"rule='additive', now it is 'multiplicative'.* on_mismatch='restart'"):
        make_trainer(tmp_path, HypergradientDescent("multiplicative"), max_epochs=2).fit(
            Reference(), ckpt_path=tmp_path / "last.ckpt"
        )

    class Confused(HypergradientDescent):
        def on_train_start(self, *arguments: Any) -> None:
            self.load_state_dict({"optimizers": []})
            super().on_train_start(*arguments)

    with pytest.raises(ValueError, match="state of 0 optimizers, but configure_optimizers returned 1"):
        make_trainer(tmp_path, Confused()).fit(Reference())


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_a_checkpoint_that_is_validated_does_not_leak_into_a_fresh_fit(tmp_path: Path, entry: str) -> None:
    class Evaluated(Reference):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", reference.torch_loss(self.network, *batch))

        test_step = validation_step
        val_dataloader = test_dataloader = Reference.train_dataloader

    settings: dict[str, Any] = {"limit_val_batches": 2, "limit_test_batches": 2}
    trainer = make_trainer(tmp_path, HypergradientDescent("multiplicative"), limit_train_batches=20, **settings)
    trainer.fit(Evaluated())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hd = HypergradientDescent("multiplicative")
    trainer = make_trainer(tmp_path, hd, max_steps=3, **settings)
    getattr(trainer, entry)(Evaluated(), ckpt_path=tmp_path / "last.ckpt")
    trainer.fit(Evaluated())
    assert hd.lrs["lr-SGD"][0] == 0.01


def test_a_state_loaded_while_training_is_gone_on_from(tmp_path: Path) -> None:
    hd = HypergradientDescent("multiplicative")

    class Rewind(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 10:
                self.saved = copy.deepcopy((trainer.optimizers[0].state_dict(), hd.state_dict()))
            if trainer.global_step == 20:
                trainer.optimizers[0].load_state_dict(self.saved[0])
                hd.load_state_dict(self.saved[1])

    trainer = make_trainer(tmp_path, hd, Rewind(), max_steps=30)
    trainer.fit(Reference())
    lrs = hd.lrs["lr-SGD"]
    assert abs(lrs[20] / lrs[9] - 1) < 0.1
    assert abs(lrs[20] / lrs[19] - 1) > 0.1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["HypergradientDescent"]
    assert saved["optimizers"][0]["rates"]["groups"][0]["lr"] == lrs[-1]


@pytest.mark.parametrize("back", [1, 3])
def test_every_step_is_recorded_though_the_state_of_an_earlier_one_is_loaded(back: int, tmp_path: Path) -> None:
    hd = HypergradientDescent("multiplicative")

    class Rewind(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 10 - back:
                self.saved = copy.deepcopy((trainer.optimizers[0].state_dict(), hd.state_dict()))
            if trainer.global_step == 10:
                trainer.optimizers[0].load_state_dict(self.saved[0])
                hd.load_state_dict(self.saved[1])

    make_trainer(tmp_path, hd, Rewind(), max_steps=20).fit(Reference())
    assert len(hd.lrs["lr-SGD"]) == 20
    assert hd.engines[0].step_count == 20 - back


def test_an_engine_that_the_user_pauses_stays_paused(tmp_path: Path) -> None:
    hd = HypergradientDescent("multiplicative")

    class Pause(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            hd.engines[0].paused = 5 <= batch_idx < 10

    make_trainer(tmp_path, hd, Pause(), limit_train_batches=20).fit(Reference())
    assert hd.engines[0].step_count == len(hd.lrs["lr-SGD"]) == 15


def test_a_copy_leaves_the_module_behind(tmp_path: Path) -> None:
    hd, module = HypergradientDescent("multiplicative"), Reference(lambda network: SGD(network.parameters(), lr=0.01))
    make_trainer(tmp_path, hd, limit_train_batches=5).fit(module)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(module)
    for other in (pickle.loads(pickle.dumps(hd)), copy.deepcopy(hd)):
        assert (other.rule, other.engines) == ("multiplicative", [])
        assert not any(isinstance(getattr(value, "__self__", None), nn.Module) for value in vars(other).values())


def test_the_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    for hd in (HypergradientDescent(), HypergradientDescent(Additive(1e-3), scope="group", max_lr=1.0)):
        for twin in (copy.deepcopy(hd), pickle.loads(pickle.dumps(hd))):
            make_trainer(tmp_path, twin, max_steps=5).fit(Reference())
            assert len(twin.lrs["lr-SGD"]) == 5


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rule": "auto-magic"}, ValueError, "rule must be one of"),
        ({"rule": "auto", "hypergrad_lr": 0.1}, ValueError, "hypergrad_lr=0.1 has no effect on rule='auto'"),
        ({"hypergrad_lr": -1}, ValueError, "hypergrad_lr"),
        ({"scope": "all"}, ValueError, "scope"),
        ({"min_lr": 2.0, "max_lr": 1.0}, ValueError, "min_lr"),
        ({"log_every_n_steps": 2.5}, TypeError, "log_every_n_steps must be a whole number"),
        ({"log_every_n_steps": True}, TypeError, "log_every_n_steps must be a whole number"),
        ({"log_every_n_steps": -1}, ValueError, "log_every_n_steps must not be negative"),
        ({"stop_after": -1}, ValueError, "stop_after must not be negative"),
        ({"stop_after": 1.5}, TypeError, "stop_after must be a whole number"),
        ({"scheduled": "yes"}, TypeError, "scheduled must be True or False"),
        ({"prog_bar": 1}, TypeError, "prog_bar must be True or False"),
        ({"on_mismatch": "ignore"}, ValueError, "on_mismatch must be 'error' or 'restart'"),
        ({"prog_bar": None}, TypeError, "prog_bar must be True or False, got None"),
        ({"summary": None}, TypeError, "summary must be True or False, got None"),
        ({"warm_start": 1}, TypeError, "warm_start must be True or False, got 1"),
        ({"max_lr": -0.1}, ValueError, "max_lr must be above 0, got -0.1"),
        ({"max_lr": 0}, ValueError, r"max_lr must be above 0, got 0 \(or pass min_lr=None"),
        ({"rule": SGD(nn.Linear(1, 1).parameters(), lr=0.1)}, TypeError, r"optimizer SGD.* HypergradientLR\(optimizer"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HypergradientDescent(**{"rule": "additive", **arguments})
    HypergradientDescent(min_lr=None, max_lr=0)  # rates below 0, as in the paper


def test_what_cannot_be_tuned_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Reference(lambda network: torch.optim.LBFGS(network.parameters()))
    before = copy.deepcopy(module)
    with pytest.raises(TypeError, match="LBFGS has no learning rate to tune"):
        make_trainer(tmp_path, HypergradientDescent()).fit(module)
    assert same(before, module)

    module = Reference(lambda network: SGD(module.parameters(), lr=0.01))
    module.table = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(TypeError, match="module 'table' has sparse gradients"):
        make_trainer(tmp_path, HypergradientDescent()).fit(module)

    trainer: Any = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    with pytest.raises(TypeError, match="does not support DeepSpeedStrategy"):
        HypergradientDescent().on_train_start(trainer, module)
    trainer.strategy = FSDPStrategy.__new__(FSDPStrategy)  # is taken, so that the module is looked at
    trainer.optimizers, trainer.lr_scheduler_configs, trainer.lightning_module = (
        [module.configure_optimizers()],
        [],
        module,
    )
    with pytest.raises(TypeError, match="module 'table' has sparse gradients"):
        HypergradientDescent().on_train_start(trainer, module)


def test_an_error_in_the_second_optimizer_releases_the_first(tmp_path: Path) -> None:
    module = Alternating()
    module.configure_optimizers = lambda: [  # type: ignore[method-assign]
        Adam(module.parts[0].parameters()),
        Adam([{"params": module.parts[1].parameters(), "lr": math.nan}]),
    ]
    trainer = make_trainer(tmp_path, HypergradientDescent())
    with pytest.raises(ValueError, match=r"lr of Adam param_groups\[0\] must be"):
        trainer.fit(module)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


class Mine(HypergradientDescent):
    pass


@pytest.mark.parametrize("second", [HypergradientDescent, Mine])
def test_the_callback_twice_is_an_error(second: type[HypergradientDescent], tmp_path: Path) -> None:
    words = rf"2 HypergradientDescent callbacks \(HypergradientDescent, {second.__name__}\): keep one of them"
    trainer = make_trainer(tmp_path, HypergradientDescent(), second())
    with pytest.raises(RuntimeError, match=words):
        trainer.fit(Reference())
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:.*returned .None.*")
def test_a_module_without_an_optimizer_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no learning rate to tune"):
        make_trainer(tmp_path, HypergradientDescent()).fit(Reference(lambda _: None))
