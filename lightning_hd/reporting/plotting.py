"""Draws what runs have logged: learning rates, loss and cosines. The command is ``python -m lightning_hd plot``."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hd.optimizers import LARGEST
from lightning_hd.reporting.runs import Curve, Curves, PlotError, load, natural

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
INSTALL = "pip install matplotlib typer"

# The colours of Okabe and Ito, dark and light in turn, and a grey. 5 and 8 have no common divisor, so that 40 lines
# differ without colour as well.
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#404040")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("solid", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (2, 1)))
LINE = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.4, "linewidth": 1.1}

COLUMN = 3.5  # inches, the width of a column of a paper
LABEL, SMALL = 8, 7  # points
LINE_CHARACTERS = 48  # of SMALL, in a column


def plot(runs: Sequence[Path | str], loss: str | None = None) -> "Figure":
    """Draw the runs in some folders, and in the folders below them.

    Args:
        runs: Folders with event files of TensorBoard or with ``metrics.csv`` of Lightning's ``CSVLogger``.
        loss: The tag of the loss, with or without the prefix of its logger; ``None``: the first of ``loss``,
            ``train_loss``, ``train/loss``, ``loss_step`` and ``train_loss_step`` that a run has logged, else the first
            tag that ends in ``loss``.

    Raises:
        PlotError: A folder or the tag does not exist, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    return figure(load(runs, loss))


@dataclass
class _Panel:
    """Lines that share a vertical axis. The key of a line is its run and its label. It decides on the style."""

    label: str
    log: bool = False
    smooth_from: float = math.inf  # lines with so many points get a running mean
    signed: bool = False  # from -1 to 1, with a line at 0
    lines: list[tuple[tuple[int, str], Any, Any]] = field(default_factory=list)

    def add(self, key: tuple[int, str], curve: Curve) -> None:
        """Add a line, with gaps where it cannot be drawn. A line that can be drawn nowhere is left out."""
        steps, values = (np.asarray(numbers, dtype=float) for numbers in curve)
        visible = (abs(values) <= LARGEST) & ((values > 0) | (not self.log))
        if visible.any():
            self.lines.append((key, steps, np.where(visible, values, np.nan)))


def figure(curves: Sequence[Curves], width: float = COLUMN) -> "Figure":
    """Draw curves: a panel each for learning rates, losses and cosines, with the legend below.

    The thick lines of the cosines, and of losses with 100 points or more, are running means over a twentieth of the
    points, five at least. The thin lines below are the numbers themselves. Rates that are not above 0, and numbers that
    are not finite in float32, are gaps. The axis of the losses is logarithmic if all are above 0. Lines have the labels
    of the legend, except for the thin ones.

    Args:
        curves: The curves of each run. They need not come from files.
        width: The width of the figure, in inches.

    Raises:
        PlotError: There is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    names = {run.loss_name for run in curves if run.loss}
    losses = [value for run in curves if run.loss for value in run.loss[1] if abs(value) <= LARGEST]
    rates = _Panel("learning rate", log=True)
    loss = _Panel(names.pop() if len(names) == 1 else "loss", all(value > 0 for value in losses), smooth_from=100)
    cosines = _Panel("cosine", smooth_from=0, signed=True)
    for i, run in enumerate(curves):
        if run.loss:
            loss.add((i, run.name), run.loss)
        several = max(len(run.rates), len(run.cosines)) > 1
        for panel, groups in ((rates, run.rates), (cosines, run.cosines)):
            for group, curve in groups.items():
                own = several and (group in run.rates or len(run.cosines) > 1)
                panel.add((i, " · ".join(filter(None, (run.name, group))) if own else run.name or group), curve)
    panels = [panel for panel in (rates, loss, cosines) if panel.lines]
    if not panels:
        raise PlotError("nothing to draw: there is no finite number, and no learning rate above 0")
    return _draw(panels, width)


def _draw(panels: Sequence[_Panel], width: float) -> "Figure":
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"drawing needs matplotlib: {INSTALL}", name="matplotlib") from error
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    keys = sorted({key for panel in panels for key, _, _ in panel.lines}, key=lambda key: (key[0], natural(key[1])))
    styles = {key: _style(i, key[1]) for i, key in enumerate(keys)}
    handles = [Line2D([], [], **styles[key]) for key in keys if key[1]]
    lines = [line for handle in handles for line in str(handle.get_label()).split("\n")]
    fitting = int(LINE_CHARACTERS * width / COLUMN / (max(map(len, lines), default=0) + 8))
    columns = max(1, min(len(handles), 3, fitting))
    height = 0.35 + 1.2 * len(panels) + 0.15 * math.ceil(len(lines) / columns)
    drawn = Figure(figsize=(width, height), layout="constrained")
    grid = drawn.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _fill(axes, panel, styles)
    grid[-1].set_xlabel("step", fontsize=LABEL)
    drawn.align_ylabels(grid)
    if handles:
        options: dict[str, Any] = {"fontsize": SMALL, "frameon": False, "handlelength": 3.2, "borderaxespad": 0}
        legend = drawn.legend(handles=handles, loc="outside lower center", ncols=columns, **options)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return drawn


def _style(i: int, label: str) -> dict[str, Any]:
    own = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
    return {**LINE, **own, "label": _wrapped(label)}


def _wrapped(label: str) -> str:
    """A label on as many lines as it needs. matplotlib does not show labels that begin with an underscore."""
    words = (label.lstrip("_") or label.replace("_", "-")).replace("/", "/ ")
    return "\n".join(line.replace("/ ", "/") for line in textwrap.wrap(words, LINE_CHARACTERS))


def _fill(axes: "Axes", panel: _Panel, styles: Mapping[tuple[int, str], dict[str, Any]]) -> None:
    if panel.signed:
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_ylim(-1, 1)
    if panel.log:
        axes.set_yscale("log")
    order = list(styles)
    for key, steps, values in panel.lines:
        style = styles[key]
        if len(values) >= panel.smooth_from:
            axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=min(0.35, 1 / len(panel.lines)))
            values = _running_mean(values)
            style = {**style, "linewidth": 1.4}
        axes.plot(steps, values, markevery=_marked(values, (order.index(key) + 0.5) / len(order)), **style)
    axes.margins(x=0.02)
    if panel.log:
        _tick(axes)
    axes.set_ylabel(panel.label, fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(axes: "Axes") -> None:
    """Label the powers of ten of a logarithmic axis and, if they are few, also twice and five times these."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = (math.log10(bound) for bound in axes.get_ylim())
    if math.floor(high) - math.ceil(low) < 2:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _running_mean(values: Any) -> Any:
    """The mean of the finite values in a window around each value. The window is cut off at the ends."""
    half = max(5, len(values) // 20) // 2
    there = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(there, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(there)))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.divide(sums[high] - sums[low], counts[high] - counts[low], out=np.full(len(values), np.nan), where=there)


def _marked(values: Any, phase: float, markers: int = 6) -> list[bool]:
    """Which points get a marker: some, at other places than in other lines, and all without a neighbour."""
    there = np.isfinite(values)
    padded = np.concatenate(([False], there, [False]))
    marked = there & ~padded[:-2] & ~padded[2:]
    points = np.flatnonzero(there)
    marked[points[((np.arange(markers) + phase) / markers * len(points)).astype(int)]] = True
    return [bool(mark) for mark in marked]


# ---------------------------------------------------------------------- writing


def check_file(path: Path) -> None:
    """Raise ``PlotError`` if ``save`` could not write there."""
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"cannot write {path}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise PlotError(f"cannot write {path}: the folder {path.parent} does not exist")


def save(drawn: "Figure", path: Path | str) -> None:
    """Write a figure as PNG (300 dpi), SVG or PDF. In SVG and PDF, text stays text.

    Raises:
        PlotError: The name does not end in one of these, or the folder does not exist.
        OSError: The file cannot be written.
    """
    import matplotlib

    check_file(Path(path))
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        drawn.savefig(path, dpi=300)
