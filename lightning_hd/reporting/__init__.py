"""What is recorded, logged, summarized and drawn. The figures are for users as well."""

from lightning_hd.reporting import loggers, summary
from lightning_hd.reporting.names import optimizer_names
from lightning_hd.reporting.plotting import figure, plot, save
from lightning_hd.reporting.recorder import Recorder
from lightning_hd.reporting.runs import Curves, PlotError, load

__all__ = ["Curves", "PlotError", "Recorder", "figure", "load", "loggers", "optimizer_names", "plot", "save", "summary"]
