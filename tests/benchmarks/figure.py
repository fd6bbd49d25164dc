"""The figure: how much the loss depends on the configured learning rate."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from tests.benchmarks.results import Losses, Results
from tests.benchmarks.tasks import TASKS
from tests.benchmarks.tuners import BASES, RULE_RATE

PREFERRED = ("fashion-mlp", "text", "digits-16")

# Okabe and Ito's palette: told apart with any colour vision.
STYLES: dict[str, dict[str, Any]] = {
    "constant": {"color": "#000000", "marker": "o"},
    "cosine": {"color": "#56B4E9", "marker": "o"},
    "additive": {"color": "#E69F00", "marker": "s", "linestyle": ":"},
    "multiplicative": {"color": "#009E73", "marker": "D", "linestyle": ":"},
}
OWN = "#D55E00"

PLAIN: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "font.size": 9,
    "axes.titlesize": 9,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "ytick.minor.size": 0,
}


def draw(results: Results, rule: str, path: Path) -> None:
    """Medians over the seeds: a row for each of up to three tasks, a column for each optimizer."""
    losses = Losses(results, "train_loss")
    known = dict.fromkeys(run.task for run in results)
    tasks = [task for task in dict.fromkeys((*PREFERRED, *known)) if task in known][:3]
    optimizers = [name for name in BASES if any(run.optimizer == name for run in results)]
    with mpl.rc_context(PLAIN):
        figure = Figure(figsize=(1 + 2.6 * len(optimizers), 0.8 + 2.1 * len(tasks)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(tasks), len(optimizers), squeeze=False, sharex="col", sharey="row")
        for row, task in zip(axes, tasks, strict=True):
            ceiling = 2 * max(_untrained(losses, task, optimizer) for optimizer in optimizers)
            for panel, optimizer in zip(row, optimizers, strict=True):
                _panel(panel, losses, task, optimizer, rule, ceiling)
            row[0].set_ylabel(f"{TASKS[task].title}\ntraining loss")
        for panel, optimizer in zip(axes[0], optimizers, strict=True):
            panel.set_title(optimizer)
        for panel in axes[-1]:
            panel.set_xlabel("configured learning rate")
        entries: dict[str, Any] = {}
        for panel in axes.flat:
            handles, labels = panel.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        entries["diverged or above"] = Line2D([], [], color="#999999", marker="^", linestyle="")
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=160)


def _untrained(losses: Losses, task: str, optimizer: str) -> float:
    """The loss at the lowest constant rate, near that before training."""
    return next(iter(losses.curve(task, optimizer, "constant").values()), 0.0)


def _panel(panel: Axes, losses: Losses, task: str, optimizer: str, rule: str, ceiling: float) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    for method, style in STYLES.items():
        curve = losses.curve(task, optimizer, method)
        if not curve or method == rule:
            continue
        shown = {rate: loss for rate, loss in curve.items() if loss < (ceiling or math.inf)}
        panel.plot(list(shown), list(shown.values()), label=method, **style)
        for rate in curve.keys() - shown.keys():
            panel.plot(rate, 1, "^", color=style["color"], transform=panel.get_xaxis_transform(), clip_on=False)
    own = losses.at(task, optimizer, rule, RULE_RATE)
    if math.isfinite(own):
        panel.axhline(own, color=OWN, linewidth=2, label=f"{rule}, configured at {RULE_RATE:g}")
