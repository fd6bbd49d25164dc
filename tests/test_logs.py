"""What loggers get beside the curves: the settings, a layout of charts; and how a curve goes on."""

import contextlib
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lightning_hd import Auto, HypergradientDescent
from tests.test_callback import AfterOneEpoch, Reference, events, make_trainer, scalars

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Saved(Reference):
    """A module with hyperparameters of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("module", [Reference, Saved])
def test_the_settings_are_among_the_hyperparameters_of_every_logger(
    module: type[LightningModule], tmp_path: Path
) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    hd = HypergradientDescent("multiplicative", hypergrad_lr=0.05, max_lr=0.5)
    make_trainer(tmp_path, hd, logger=loggers, limit_train_batches=10).fit(module())
    (content,) = events(tmp_path / "tb").PluginTagToContent("hparams").keys() & {"_hparams_/session_start_info"}
    data = plugin_data_pb2.HParamsPluginData.FromString(events(tmp_path / "tb").PluginTagToContent("hparams")[content])
    shown = {key: value.string_value or value.number_value for key, value in data.session_start_info.hparams.items()}
    (file,) = (tmp_path / "csv").rglob("hparams.yaml")
    for found in (shown, yaml.safe_load(file.read_text())):
        assert found["hd/rule"] == "multiplicative"
        assert found["hd/hypergrad_lr"] == 0.05
        assert found["hd/max_lr"] == 0.5
        assert found["hd/scope"] == "global"
        assert ("width" in found) == (module is Saved)


def test_event_files_have_a_layout_of_charts_whose_tags_are_there(tmp_path: Path) -> None:
    def configure(network: Any) -> Any:
        optimizer = SGD(network.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 50), "interval": "step"}}

    hd, monitor = HypergradientDescent(), LearningRateMonitor()
    logger = TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, hd, monitor, logger=logger, log_every_n_steps=10).fit(Reference(configure))
    found = events(tmp_path)
    (tensor,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    tags = found.Tags()["scalars"]
    for title, expressions in charts.items():
        for expression in expressions:
            matching = [tag for tag in tags if re.match(expression, tag)]
            assert matching or title == "backoffs", (title, expression)
    schedule, scale, lr = (scalars(tmp_path, f"hd/{what}-SGD") for what in ("schedule", "scale", "lr"))
    assert [round(schedule[step], 6) for step in (9, 59, 109)] == [0.01, 0.001, 0.0001]
    assert {step: schedule[step] * scale[step] for step in scale} == pytest.approx({s: lr[s] for s in scale}, rel=1e-5)


def test_a_curve_of_a_resumed_run_goes_on_without_a_gap_or_a_step_twice(tmp_path: Path) -> None:
    whole = HypergradientDescent()
    make_trainer(tmp_path, whole, max_epochs=2, limit_train_batches=33).fit(Reference())
    trainer: Any = None
    for resume in (None, tmp_path / "last.ckpt"):
        logger = TensorBoardLogger(tmp_path, name="run", version=0)
        stop = [AfterOneEpoch()] if resume is None else []
        settings: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 33, "log_every_n_steps": 10}
        trainer = make_trainer(tmp_path, HypergradientDescent(), *stop, logger=logger, **settings)
        trainer.fit(Reference(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    for tag in ("hd/lr-SGD", "hd/log10_lr-SGD"):
        steps = sorted(event.step for event in events(tmp_path / "run").Scalars(tag))
        assert steps == list(range(66))
    assert list(scalars(tmp_path / "run", "hd/lr-SGD").values()) == pytest.approx(whole.lrs["lr-SGD"], rel=1e-6)


class Fails(Callback):
    """Ends the training in a hook after some steps, and the writing of event files with it if that is ``broken``."""

    def __init__(self, error: BaseException, hook: str, broken: bool = False) -> None:
        self.error = error
        self.broken = broken
        setattr(self, hook, self.fail)

    def fail(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 17:
            if self.broken:
                trainer.logger.experiment.add_scalar = self.break_down
            raise self.error

    def break_down(self, *_: Any) -> None:
        raise OSError("disk full")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_optimizer_step", "on_train_batch_start"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ArithmeticError("stop"), KeyboardInterrupt()])
def test_an_error_loses_no_rate_and_a_resumed_run_has_none_twice(
    error: BaseException, first: bool, hook: str, tmp_path: Path
) -> None:
    hd, resumed, saver = HypergradientDescent(), HypergradientDescent(), OnExceptionCheckpoint(tmp_path)
    fails = Fails(error, hook)
    handler = signal.getsignal(signal.SIGINT)
    for callback, others, path in ((hd, [fails], None), (resumed, [], saver.ckpt_path)):
        own = [*others, callback] if first else [callback, *others]
        settings: dict[str, Any] = {"logger": TensorBoardLogger(tmp_path, name="run", version=0)}
        if path is None:
            own, settings["enable_checkpointing"] = [*own, saver], True
        trainer = make_trainer(tmp_path, *own, limit_train_batches=30, **settings)
        with pytest.raises((ArithmeticError, SystemExit)) if path is None else contextlib.nullcontext():
            trainer.fit(Reference(), ckpt_path=path)
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it after a KeyboardInterrupt
    points = sorted((event.step, event.value) for event in events(tmp_path / "run").Scalars("hd/lr-SGD"))
    assert [value for _, value in points] == pytest.approx(hd.lrs["lr-SGD"] + resumed.lrs["lr-SGD"], rel=1e-6)
    assert len(hd.lrs["lr-SGD"]) == 17
    assert [step for step, _ in points[:17]] == list(range(17))
    assert len({step for step, _ in points}) == len(points)


@pytest.mark.parametrize("every", [0, None])
def test_what_fails_after_an_error_does_not_hide_it(every: int | None, tmp_path: Path) -> None:
    hd = HypergradientDescent(log_every_n_steps=every)
    fails = Fails(ArithmeticError("stop"), "on_train_batch_end", broken=every is None)
    trainer = make_trainer(tmp_path, fails, hd, logger=TensorBoardLogger(tmp_path), limit_train_batches=30)
    with pytest.raises(ArithmeticError, match="stop"):
        trainer.fit(Reference())
    assert "hd/lr-SGD" not in events(tmp_path).Tags()["scalars"]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks  # type: ignore[attr-defined]


def test_a_representation_shows_what_differs_from_the_defaults() -> None:
    assert repr(HypergradientDescent()) == "HypergradientDescent(rule='auto')"
    shown = repr(HypergradientDescent(Auto(start="configured"), max_lr=0.1, prog_bar=True))
    assert shown.startswith("HypergradientDescent(rule=Auto(start='configured')")
    assert shown.endswith("max_lr=0.1, prog_bar=True)")


def test_nothing_waits_to_be_logged_where_nothing_is(tmp_path: Path) -> None:
    hd = HypergradientDescent(log_every_n_steps=0)
    make_trainer(tmp_path, hd, logger=TensorBoardLogger(tmp_path), limit_train_batches=30).fit(Reference())
    assert len(hd.lrs["lr-SGD"]) == 30
    (recorder,) = hd._recorders
    assert recorder.take_curve() == []
    assert "hd/cosine-SGD" not in recorder.collect()


def halves(network: Any) -> SGD:
    first, *others = network.parameters()
    return SGD([{"params": [first]}, {"params": others}], lr=0.01)


class WriteLate(Callback):
    """Writes another rate into the second group before step 30."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 30:
            trainer.optimizers[0].param_groups[1]["lr"] *= 0.5


def test_each_group_has_a_curve_of_its_own(tmp_path: Path) -> None:
    same, apart = HypergradientDescent(), HypergradientDescent()
    settings: dict[str, Any] = {"limit_train_batches": 60, "log_every_n_steps": 7}
    make_trainer(tmp_path, same, logger=TensorBoardLogger(tmp_path / "same"), **settings).fit(Reference(halves))
    loggers = [TensorBoardLogger(tmp_path / "apart"), CSVLogger(tmp_path / "csv")]
    make_trainer(tmp_path, apart, WriteLate(), logger=loggers, **settings).fit(Reference(halves))
    for name, hd in (("same", same), ("apart", apart)):
        for group in ("SGD/pg1", "SGD/pg2"):
            curve = scalars(tmp_path / name, f"hd/lr-{group}")
            assert list(curve) == list(range(60))
            assert list(curve.values()) == pytest.approx(hd.lrs[f"lr-{group}"], rel=1e-6)
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    assert {"hd/lr-SGD/pg1", "hd/lr-SGD/pg2"} <= set(file.read_text().splitlines()[0].split(","))
