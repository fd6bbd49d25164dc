"""What CSVLogger, WandbLogger and MLFlowLogger make of the logged numbers, each read back from what it has written."""

import csv
import importlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_hd import HypergradientDescent
from lightning_hd.reporting.names import LAYOUT
from tests.test_callback import LOGGED, Digits, Observer, Reference, events, make_trainer, scalars, tags

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

EPOCH = 29
"""How many batches the digits are."""

NUMBERS = {f"hd/{what}-SGD" for what in ("lr", "scale", "hypergradient", "cosine", "mean_cosine")}
"""What loggers other than TensorBoardLogger get of one group, backoffs and schedules aside."""

Row = dict[str, float]


class Logging(Digits):
    """Digits, with a loss of every step and of every epoch, and one of a validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    val_dataloader = Digits.train_dataloader


class TwoOptimizers(Logging):
    """The body and the head are each trained by an optimizer of its own, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        body, _, head = self.network
        return [SGD(body.parameters(), lr=0.1), Adam(head.parameters(), lr=1e-3)]


class Join(Callback):
    """Adds the last parameter to the optimizer at some batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            trainer.optimizers[0].add_param_group({"params": [*pl_module.parameters()][3:], "lr": 0.01})


def rows_of(path: Path) -> list[Row]:
    """The rows of the one file of a CSVLogger under a folder, each without its empty cells."""
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(lines)]


def own(rows: list[Row]) -> list[Row]:
    """The numbers of the callback: the rows that have some, with their steps."""
    found = [{key: value for key, value in row.items() if key.startswith("hd/") or key == "step"} for row in rows]
    return [row for row in found if len(row) > 1]


def others(rows: list[Row]) -> list[Row]:
    """What the rows hold besides."""
    found = [{key: value for key, value in row.items() if not key.startswith("hd/")} for row in rows]
    return [row for row in found if row.keys() != {"step"}]


def fit_csv(path: Path, module: LightningModule, *callbacks: Callback, **arguments: Any) -> list[Row]:
    """The rows that a training writes."""
    make_trainer(path, *callbacks, **{"logger": CSVLogger(path), "log_every_n_steps": 5, **arguments}).fit(module)
    return rows_of(path)


# ---------------------------------------------------------------------- CSVLogger


@pytest.mark.parametrize(
    ("make", "settings", "arguments"),
    [
        (Logging, {}, {"max_epochs": 2}),
        (Logging, {}, {"log_every_n_steps": 1}),
        (Logging, {"prog_bar": True}, {"log_every_n_steps": 1, "enable_progress_bar": True}),
        (Logging, {}, {"accumulate_grad_batches": 4, "log_every_n_steps": 2, "max_epochs": 2}),
        (Logging, {}, {"val_check_interval": 10}),
        (TwoOptimizers, {}, {"max_epochs": 2}),
        (TwoOptimizers, {"scope": "group"}, {"log_every_n_steps": 1}),
    ],
)
def test_each_logged_step_has_one_row_more_and_the_others_stay_as_they_are(
    make: Callable[[], LightningModule], settings: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """With 0 for β, training is the same with and without the callback, so that their rows are comparable."""
    without = fit_csv(tmp_path / "without", make(), **arguments)
    hd = HypergradientDescent("additive", hypergrad_lr=0, **settings)
    rows = fit_csv(tmp_path / "with", make(), hd, **arguments)
    assert others(rows) == without
    assert [row["step"] for row in own(rows)] == [row["step"] for row in without if "loss_step" in row] != []
    assert len(rows) == len(without) + len(own(rows))
    names = ["SGD"] if make is Logging else ["SGD", "Adam"]
    expected = {tag.replace("SGD", name) for name in names for tag in NUMBERS}
    for row in own(rows):
        unknown = {tag for tag in expected if "hypergradient" in tag or "cosine" in tag} if row["step"] == 0 else set()
        assert row.keys() - {"step"} == expected - unknown


def test_values_are_those_of_the_callback(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    observer = Observer(hd)
    rows = own(fit_csv(tmp_path, Logging(), hd, observer, max_epochs=2))
    assert [row["step"] for row in rows] == list(range(4, 2 * EPOCH, 5))
    for row in rows:
        step = int(row["step"])
        since = slice(step - 4, step + 1)
        assert row["hd/lr-SGD"] == hd.lrs["lr-SGD"][step]
        assert row["hd/scale-SGD"] == pytest.approx(row["hd/lr-SGD"] / 1e-5)
        assert row["hd/hypergradient-SGD"] == pytest.approx(np.nanmean(observer.values[since]), rel=1e-5)
        assert row["hd/cosine-SGD"] == pytest.approx(np.nanmean(observer.cosines[since]), rel=1e-5)


@pytest.mark.parametrize(("of_trainer", "of_callback"), [(5, 0), (0, None), (0, 4), (10, 5)])
def test_an_interval_of_its_own(of_trainer: int, of_callback: int | None, tmp_path: Path) -> None:
    without = fit_csv(tmp_path / "without", Logging(), log_every_n_steps=of_trainer)
    hd = HypergradientDescent("additive", hypergrad_lr=0, log_every_n_steps=of_callback)
    rows = fit_csv(tmp_path / "with", Logging(), hd, log_every_n_steps=of_trainer)
    assert others(rows) == without
    steps = range(of_callback - 1, EPOCH, of_callback) if of_callback else range(0)
    assert [row["step"] for row in own(rows)] == list(steps)


def test_columns_that_come_later_leave_earlier_rows_as_they_were(tmp_path: Path) -> None:
    class Leaping(Reference):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + 9 * (loss - loss.detach()) if batch_idx in (95, 150) else loss

    hd = HypergradientDescent()
    module = Leaping(lambda network: SGD([*network.parameters()][:3], lr=0.01))
    rows = fit_csv(tmp_path, module, hd, Join(125), log_every_n_steps=10)
    assert [row["step"] for row in own(rows)] == list(range(9, 200, 10))
    for row in own(rows):
        step = int(row["step"])
        assert row["hd/lr-SGD"] == hd.lrs["lr-SGD"][step]
        assert row.get("hd/lr-SGD/pg2") == (hd.lrs["lr-SGD/pg2"][step - 125] if step > 125 else None)
        assert row.get("hd/backoffs-SGD") == (None if step < 95 else 1 if step < 150 else 2)
        assert row.keys() >= NUMBERS


def test_an_event_file_and_a_csv_file_of_one_training_hold_the_same(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    hd = HypergradientDescent()
    rows = fit_csv(tmp_path / "csv", Logging(), hd, logger=loggers)
    assert tags(tmp_path / "tb") == {f"hd/{what}-SGD" for what in LOGGED}
    for tag in NUMBERS - {"hd/lr-SGD"}:
        found = {int(row["step"]): row[tag] for row in own(rows)}
        assert scalars(tmp_path / "tb", tag) == pytest.approx(found, rel=1e-6)
    points = [(event.step, event.value) for event in events(tmp_path / "tb").Scalars("hd/lr-SGD")]
    assert points == [(step, pytest.approx(lr, rel=1e-6)) for step, lr in enumerate(hd.lrs["lr-SGD"])]
    assert [row["hd/lr-SGD"] for row in own(rows)] == hd.lrs["lr-SGD"][4::5]


def test_a_prefix_is_before_all_tags_and_the_charts_show_them(tmp_path: Path) -> None:
    """Lightning offers it to tell trainings apart that share a folder."""
    trainings = {"plain": "", "student": "student", "fold": "fold/1"}
    steps = {}
    for name, prefix in trainings.items():
        hd = HypergradientDescent()
        logger = TensorBoardLogger(tmp_path / name, prefix=prefix)
        make_trainer(tmp_path, hd, logger=logger, log_every_n_steps=5).fit(Logging())
        tag = f"{prefix}-hd/lr-SGD" if prefix else "hd/lr-SGD"
        steps[name] = [event.step for event in events(tmp_path / name).Scalars(tag)]
    plain, *others = (set(events(tmp_path / name).Tags()["scalars"]) for name in trainings)
    for prefix, found in zip(["student", "fold/1"], others, strict=True):
        assert found == {f"{prefix}-{tag}" for tag in plain}
    assert steps["plain"] == steps["student"] == steps["fold"] == list(range(EPOCH))
    for _, expressions in LAYOUT["learning rate"].values():
        matching = [{tag for tag in found if re.match("|".join(expressions), tag)} for found in (plain, others[0])]
        assert matching[1] == {f"student-{tag}" for tag in matching[0]}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("add", [[], ["--trainer.callbacks+=lightning_hd.HypergradientDescent"]])
def test_the_other_hyperparameters_are_those_that_lightning_logs(add: list[str], tmp_path: Path) -> None:
    """Its command line keeps the module's class among the hyperparameters, and does not log it."""
    settings = {"max_steps": 5, "logger": "CSVLogger", "logger.save_dir": tmp_path, "enable_progress_bar": "false"}
    arguments = [f"--trainer.{name}={value}" for name, value in settings.items()]
    LightningCLI(
        LightningModule,
        subclass_mode_model=True,
        save_config_callback=None,
        args=["fit", "--model=tests.test_logs.Saved", "--model.width=5", *arguments, *add],
    )
    (file,) = tmp_path.rglob("hparams.yaml")
    logged = yaml.safe_load(file.read_text())
    assert any(name.startswith("hd/") for name in logged) == bool(add)
    assert {name for name in logged if not name.startswith("hd/")} == {"_instantiator", "width"}


# ---------------------------------------------------------------------- Weights & Biases


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, offline; its background process is stopped after the test."""
    package = pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{folder}", str(tmp_path))
    yield package
    package.teardown()


def records(path: Path) -> Iterator[Any]:
    """What an offline run has written, for W&B has no reader of its own that is public.

    The file is a log as LevelDB's: blocks of 32 KiB, in which each piece of a record has its checksum, length and kind.
    """
    (file,) = path.rglob("run-*.wandb")
    data, at, record = file.read_bytes(), 7, b""  # after the file's own header
    parse = importlib.import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield parse(record)
            record = b""


def test_wandb_has_the_same_rows_and_the_settings(wandb: Any, tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off"))
    rows = fit_csv(tmp_path, Logging(), HypergradientDescent(max_lr=9.0), logger=[logger, CSVLogger(tmp_path)])
    config = dict(logger.experiment.config)
    wandb.teardown()
    history: list[Row] = []
    axes = {}
    for record in records(tmp_path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
            items["step"] = items.pop("trainer/global_step")
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
        elif record.WhichOneof("record_type") == "metric":
            axes[record.metric.glob_name] = record.metric.step_metric
    assert history == rows
    assert [row["step"] for row in own(history)] == list(range(4, EPOCH, 5))
    assert axes["*"] == "trainer/global_step"
    assert (config["hd/rule"], config["hd/max_lr"], config["hd/stop_after"]) == ("auto", 9.0, "None")


# ---------------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a store of files is to be."""
    uri = (tmp_path / "mlflow").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # the logger writes it, and here it is restored
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")
    return uri


def test_mlflow_has_each_number_once_a_step_and_the_settings(mlflow_uri: str, tmp_path: Path) -> None:
    logger = MLFlowLogger(tracking_uri=mlflow_uri)
    rows = fit_csv(tmp_path, Logging(), HypergradientDescent(max_lr=9.0), logger=[logger, CSVLogger(tmp_path)])
    run = logger.experiment.get_run(logger.run_id)
    assert [row["step"] for row in own(rows)] == list(range(4, EPOCH, 5))
    for tag in NUMBERS:
        history = [(metric.step, metric.value) for metric in logger.experiment.get_metric_history(run.info.run_id, tag)]
        assert history == [(row["step"], row[tag]) for row in own(rows)]
    settings = run.data.params
    assert (settings["hd/rule"], settings["hd/max_lr"], settings["hd/stop_after"]) == ("auto", "9.0", "None")
