"""What is recorded, logged, summarized and drawn."""

from lightning_hd.reporting.loggers import describe, log, log_curves, show, show_small_numbers
from lightning_hd.reporting.names import optimizer_names
from lightning_hd.reporting.plotting import figure, plot, save
from lightning_hd.reporting.recorder import Recorder
from lightning_hd.reporting.runs import Curves, PlotError, load
from lightning_hd.reporting.summary import announce, check_tuned, say_what_is_missing, summarize

__all__ = [
    "Curves",
    "PlotError",
    "Recorder",
    "announce",
    "check_tuned",
    "describe",
    "figure",
    "load",
    "log",
    "log_curves",
    "optimizer_names",
    "plot",
    "save",
    "say_what_is_missing",
    "show",
    "show_small_numbers",
    "summarize",
]
