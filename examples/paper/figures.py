"""The figure of an experiment: learning rate, training loss and validation loss, as in the paper."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paper.settings import BASES, EXPERIMENTS, Rule, Run
from paper.training import Measured, by_epoch

# Colours of Okabe and Ito, which differ in lightness too.
STYLES: Mapping[Rule, dict[str, Any]] = {
    "none": {"color": "#000000", "linestyle": (0, (4, 1.5)), "marker": "o", "label": "without"},
    "additive": {"color": "#0072B2", "linestyle": "solid", "marker": "s", "label": "-HD, the paper's rule"},
    "auto": {"color": "#E69F00", "linestyle": "solid", "marker": "^", "label": "rule auto"},
}
PLAIN: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "font.size": 8,
    "axes.titlesize": 9,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
}
DPI = 110
ZOOM = 200
"""How many iterations the insets show."""
SMOOTH = 10
"""Over how many iterations the losses of the insets are averaged."""


def draw(measured: Mapping[Run, Measured]) -> Figure:
    """A column for each optimizer; rates and training losses have an inset with the first iterations."""
    with mpl.rc_context(PLAIN):
        figure = new_figure(7.5, 6.8)
        axes = figure.subplots(3, len(BASES), sharex=True, sharey="row", height_ratios=(1.5, 1.5, 1))
        for column, base in zip(axes.T, BASES, strict=True):
            column[0].set_title(base)
            _draw_column(column, {run: each for run, each in measured.items() if run.base == base})
        _make_room(axes[0, 0], axes[1, 0])
        for panel, label in zip(axes[:, 0], ("learning rate", "training loss", "validation loss"), strict=True):
            panel.set_ylabel(label)
        for panel in axes[-1]:
            panel.set_xlabel("epoch")
        figure.suptitle(EXPERIMENTS[next(iter(measured)).experiment].title, fontsize=10)
        handles, labels = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_column(column: Sequence[Axes], measured: Mapping[Run, Measured]) -> None:
    rates, losses, val_losses = column
    zoomed_rates = _inset(rates, (0.2, 0.08, 0.78, 0.4))
    zoomed_losses = _inset(losses, (0.2, 0.54, 0.78, 0.44))
    for panel in (rates, zoomed_rates):
        panel.set_yscale("log")
        panel.tick_params(which="minor", left=False)
    for run, each in measured.items():
        style = STYLES[run.rule]
        line = {key: value for key, value in style.items() if key != "marker"}
        for panel, values in (
            (rates, by_epoch(each.rates, run)),
            (losses, by_epoch(each.losses, run)),
            (val_losses, each.val_losses),
        ):
            panel.plot(range(1, len(values) + 1), values, **style)
        first = range(1, len(each.rates[:ZOOM]) + 1)
        zoomed_rates.plot(first, each.rates[:ZOOM], **line)
        zoomed_losses.plot(first, _means(each.losses[:ZOOM]), **line)


def _make_room(rates: Axes, losses: Axes) -> None:
    """The insets have the lower half of the panels of rates, and the upper half of those of losses."""
    low, high = rates.get_ylim()
    rates.set_yticks([tick for tick in rates.get_yticks() if low <= tick <= high])
    rates.set_ylim(low / (high / low), high)
    low, high = losses.get_ylim()
    losses.set_yticks([tick for tick in losses.get_yticks() if low <= tick <= high])
    losses.set_ylim(low, high + (high - low))


def _inset(panel: Axes, bounds: tuple[float, float, float, float]) -> Axes:
    inset = panel.inset_axes(bounds)
    inset.tick_params(which="both", labelsize=5.5, pad=1, length=2)
    inset.set_facecolor("#f7f7f7")
    return inset


def _means(values: Sequence[float]) -> list[float]:
    """Each with those before it, as many as are averaged."""
    return [fmean(values[max(0, end - SMOOTH) : end]) for end in range(1, len(values) + 1)]
