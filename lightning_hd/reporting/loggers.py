"""What loggers get: numbers at every interval, the rate of every step in event files, a layout, and the settings."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from lightning_hd.checks import class_names
from lightning_hd.reporting.names import LAYOUT, PREFIX, tag
from lightning_hd.reporting.recorder import Recorder

_DISPLAY = {"log_every_n_steps", "prog_bar", "on_mismatch", "summary"}
"""Arguments that do not change the training. They would only be in the way among the hyperparameters."""


def show(trainer: Trainer, pl_module: LightningModule, recorders: Sequence[Recorder], prog_bar: bool) -> None:
    """Give other callbacks the numbers of the last step, and the progress bar the rates."""
    for recorder in recorders:
        if news := recorder.news():  # Lightning forgets none of them, and puts its own together at each access
            trainer.callback_metrics.update(zip(news, torch.tensor([*news.values()]).unbind(), strict=True))
    if prog_bar:
        pl_module.log_dict(_rates(recorders), on_step=True, on_epoch=False, prog_bar=True, logger=False)


def log(trainer: Trainer, recorders: Sequence[Recorder], step: int) -> None:
    """Log the numbers that are new since the last call.

    Args:
        trainer: The Trainer.
        recorders: The recorders of its optimizers.
        step: The step, on the axis of ``self.log``.
    """
    means = {key: value for recorder in recorders for key, value in recorder.collect().items()}
    rates, logarithms = _rates(recorders), _logarithms(means)
    for logger in trainer.loggers:
        own = means | logarithms if _writes_events(logger) else rates | means
        logger.log_metrics(metrics=own, step=step)
    log_curves(trainer, recorders)


def _rates(recorders: Sequence[Recorder]) -> dict[str, float]:
    """The tags and the effective rates of all groups of all optimizers."""
    return {key: lr for recorder in recorders for key, lr in recorder.lr_metrics().items()}


def _logarithms(metrics: dict[str, float]) -> dict[str, float]:
    """The logarithms of scales and schedules, which add up to that of the rate."""
    starts = (tag("scale-"), tag("schedule-"))
    positive = {key: value for key, value in metrics.items() if key.startswith(starts) and value > 0}
    return {key.replace(PREFIX, f"{PREFIX}log10_", 1): math.log10(value) for key, value in positive.items()}


def log_curves(trainer: Trainer, recorders: Sequence[Recorder]) -> None:
    """Write the rates of all steps since the last call into event files."""
    points = [point for recorder in recorders for point in recorder.take_curve()]
    for logger in filter(_writes_events, trainer.loggers):
        for name, lr, step in points:
            logarithm = {tag("log10_lr", name): math.log10(lr)} if lr > 0 else {}
            logger.log_metrics(metrics={tag("lr", name): lr, **logarithm}, step=step)


def rescue_curves(trainer: Trainer, recorders: Sequence[Recorder], step: int) -> None:
    """Write the rates of all steps since the last call after an exception, those of the last batch at ``step``."""
    for recorder in recorders:
        recorder.mark(step)
    with contextlib.suppress(Exception):  # the first exception is what the user must see; this one may come of it
        log_curves(trainer, recorders)


def describe(trainer: Trainer, pl_module: LightningModule, settings: dict[str, Any]) -> None:
    """Give loggers the settings of the callback among the hyperparameters, and event files a layout of charts.

    Loggers keep the first hyperparameters that they get, so they get those of the module and its data as well.
    """
    known: dict[str, Any] = {}
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        # It is whether `save_hyperparameters` was called with `logger=True`. Lightning has no public name for it.
        if getattr(owner, "_log_hyperparams", False):
            known |= dict(getattr(owner, "hparams_initial", {}))
    known.pop("_class_path", None)  # LightningCLI keeps it there for itself, and Lightning does not log it
    own = {
        tag(name): value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in settings.items()
        if name not in _DISPLAY
    }
    for logger in trainer.loggers:
        if not _writes_events(logger):
            logger.log_hyperparams(known | own)
            continue
        # Event files hold settings beside a metric only. Without one, Lightning makes up an `hp_metric` of -1.
        metric = () if known else ({"epoch": trainer.current_epoch}, trainer.global_step)
        logger.log_hyperparams(known | own, *metric)
        getattr(logger, "experiment").add_custom_scalars(LAYOUT)  # noqa: B009


def show_small_numbers(trainer: Trainer) -> None:
    """Let a RichProgressBar show three digits of numbers below 0.001, unless it has its own format."""
    bar = trainer.progress_bar_callback
    theme = getattr(bar, "theme", None)
    if theme is not None and theme.metrics_format == ".3f":
        bar.theme = replace(theme, metrics_format=".3g")  # type: ignore[union-attr]


def _writes_events(logger: Logger) -> bool:
    """Whether a logger writes event files. Its class goes by name: the package ``pytorch_lightning`` has its own."""
    return "TensorBoardLogger" in class_names(logger)
