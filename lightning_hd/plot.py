"""Draws what runs have logged: learning rates, loss and cosines. The command is ``python -m lightning_hd plot``."""

import csv
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lightning_hd.tensorboard import FORMER, PREFIX

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""

SUFFIXES = (".png", ".svg", ".pdf")
EVENTS, CSV = "events.out.tfevents.*", "metrics.csv"
LOSSES = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step")
INSTALL = 'pip install "lightning-hd[plot]"'

# The colours of Okabe and Ito, dark and light in turn, and a grey. 5 and 8 have no common divisor, so that 40 lines
# differ without colour as well.
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#404040")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("solid", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (2, 1)))

COLUMN = 3.5  # inches
LABEL, SMALL = 8, 7  # points
LINE_CHARACTERS = 48  # of SMALL, in a column


class PlotError(ValueError):
    """There is nothing to draw, or no place for it. The message is one line."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run.

    Args:
        name: What the legend calls it.
        rates: The learning rates of each parameter group.
        loss: The loss.
        cosines: The cosines of each parameter group, or of each optimizer.
        loss_name: What the axis of the loss is called, where all runs agree.
    """

    name: str
    rates: Mapping[str, Curve]
    loss: Curve | None = None
    cosines: Mapping[str, Curve] = field(default_factory=dict)
    loss_name: str = "loss"


def plot(runs: Sequence[Path | str], loss: str | None = None) -> "Figure":
    """Draw the runs that are found in folders, and in the folders below them.

    Args:
        runs: Folders with event files of TensorBoard or with ``metrics.csv`` of Lightning's ``CSVLogger``.
        loss: The tag of the loss; ``None``: the first of ``loss``, ``train_loss``, ``train/loss``, ``loss_step`` and
            ``train_loss_step``, else the first that ends in ``loss``.

    Raises:
        PlotError: A folder or the tag does not exist, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    return figure(load(runs, loss))


# ---------------------------------------------------------------------- reading


def load(runs: Sequence[Path | str], loss: str | None = None) -> list[Curves]:
    """Read what ``plot`` draws."""
    folders = list(dict.fromkeys(folder for run in runs for folder in _find(Path(run))))
    logged = [_read(folder) for folder in folders]
    if loss is not None and not any(loss in tags for tags in logged):
        there = sorted({tag for tags in logged for tag in tags}, key=_natural)
        raise PlotError(f"no run has logged {loss!r}; the tags are: {', '.join(there)}")
    root = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    names = [folder.relative_to(root).as_posix() for folder in folders]
    curves = [_select(name, tags, loss) for name, tags in zip(names, logged, strict=True)]
    if not any(run.rates for run in curves):
        where = ", ".join(map(str, runs))
        raise PlotError(
            f"no run has logged a learning rate in {where}: looked for the tags {PREFIX}lr-NAME, {FORMER}lr-NAME "
            "(HypergradientDescent) and lr-NAME (LearningRateMonitor)"
        )
    return [run for run in curves if run.rates or run.loss or run.cosines]


def _find(folder: Path) -> list[Path]:
    """The folders of all runs in a folder, itself included, as absolute paths."""
    if not folder.is_dir():
        raise PlotError(f"{folder} is not a folder" if folder.exists() else f"folder does not exist: {folder}")
    files = [file for pattern in (EVENTS, CSV) for file in folder.rglob(pattern) if file.is_file()]
    if not files:
        raise PlotError(f"no runs in {folder}: looked for {EVENTS} and {CSV}, in the folders below as well")
    folders = {Path(os.path.abspath(file)).parent for file in files}  # noqa: PTH100  # symbolic links keep their names
    return sorted(folders, key=lambda folder: _natural(str(folder)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by: ``version_2`` comes before ``version_10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(folder: Path) -> dict[str, Curve]:
    """All scalars of a run. Where both kinds of files hold a tag, the event files count."""
    numbers: dict[str, Curve] = {}
    for source in (_csv(folder), _events(folder)):
        tags: dict[str, tuple[list[int], list[float]]] = {}
        for tag, step, value in source:
            steps, values = tags.setdefault(tag, ([], []))
            while steps and steps[-1] >= step:  # the run was resumed from there
                steps.pop()
                values.pop()
            steps.append(step)
            values.append(value)
        numbers |= tags
    return numbers


def _csv(folder: Path) -> Iterator[tuple[str, int, float]]:
    file = folder / CSV
    if not file.is_file():
        return
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                numbers = {tag: number for tag, text in row.items() if (number := _number(text)) is not None}
                step = numbers.pop("step", math.nan)
                if math.isfinite(step):
                    yield from ((tag, int(step), value) for tag, value in numbers.items())
    except (csv.Error, UnicodeDecodeError) as error:
        raise PlotError(f"{file} cannot be read: {error}") from error


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # an empty cell, or one that the header does not name
        return None


def _events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if any(folder.glob(EVENTS)):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: keeps every point
        for tag in events.Tags()[SCALARS]:
            for event in events.Scalars(tag):
                yield tag, event.step, event.value


def _select(name: str, tags: Mapping[str, Curve], loss: str | None) -> Curves:
    rates = _named(tags, (f"{FORMER}lr-", f"{PREFIX}lr-"))
    if not rates:
        others = {tag: tags[tag] for tag in tags if not tag.endswith(("-momentum", "-weight_decay"))}
        rates = _named(others, ("lr-",))
    if loss is None:
        there = [tag for tag in LOSSES if tag in tags] or [tag for tag in tags if tag.endswith("loss")]
        loss = there[0] if there else "loss"
    cosines = _named(tags, (f"{FORMER}cosine-", f"{PREFIX}cosine-"))
    return Curves(name, rates, tags.get(loss), cosines, "loss" if loss in LOSSES else loss)


def _named(tags: Mapping[str, Curve], prefixes: tuple[str, ...]) -> dict[str, Curve]:
    """The curves whose tags begin so, by the rest of the tag; a later prefix takes precedence."""
    found = {tag[len(start) :]: tags[tag] for start in prefixes for tag in tags if tag.startswith(start)}
    return {name: found[name] for name in sorted(found, key=_natural)}


# ---------------------------------------------------------------------- drawing


@dataclass
class _Panel:
    """Lines that share a vertical axis. The key of a line, run and label, decides on its style."""

    label: str
    log: bool = False
    smooth_from: float = math.inf  # how many points a line needs to get a running mean
    signed: bool = False  # from -1 to 1, with a line at 0
    lines: list[tuple[tuple[int, str], Any, Any]] = field(default_factory=list)

    def add(self, key: tuple[int, str], curve: Curve) -> None:
        """Add a line: with gaps where it cannot be drawn, and not at all where it can be drawn nowhere."""
        steps, values = (np.asarray(numbers, dtype=float) for numbers in curve)
        visible = np.isfinite(values) & ((values > 0) | (not self.log))
        if visible.any():
            self.lines.append((key, steps, np.where(visible, values, np.nan)))


def figure(curves: Sequence[Curves]) -> "Figure":
    """Draw curves: a panel each for learning rates, losses and cosines, with the legend below.

    The thick lines of the cosines, and of losses with 100 points or more, are running means over a twentieth of the
    points, five at least; the thin lines below are the numbers themselves. Rates that are not above 0, and numbers that
    are not finite, are gaps. The axis of the losses is logarithmic where all are above 0. Lines have the labels of the
    legend, but for the thin ones.

    Args:
        curves: What to draw, run by run. They need not come from files.

    Raises:
        PlotError: There is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    names = {run.loss_name for run in curves if run.loss}
    losses = [value for run in curves if run.loss for value in run.loss[1] if math.isfinite(value)]
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
    return _draw(panels)


def _draw(panels: Sequence[_Panel]) -> "Figure":
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"drawing needs matplotlib: {INSTALL}", name="matplotlib") from error
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    keys = sorted({key for panel in panels for key, _, _ in panel.lines}, key=lambda key: (key[0], _natural(key[1])))
    styles = {key: _style(i, key[1]) for i, key in enumerate(keys)}
    handles = [Line2D([], [], **styles[key]) for key in keys if key[1]]
    lines = [line for handle in handles for line in str(handle.get_label()).split("\n")]
    columns = max(1, min(len(handles), 3, int(LINE_CHARACTERS / (max(map(len, lines), default=0) + 8))))

    height = 0.35 + 1.2 * len(panels) + 0.15 * math.ceil(len(lines) / columns)
    drawn = Figure(figsize=(COLUMN, height), layout="constrained")
    grid = drawn.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _fill(axes, panel, styles)
    grid[-1].set_xlabel("step", fontsize=LABEL)
    drawn.align_ylabels(grid)
    if handles:
        legend = drawn.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            fontsize=SMALL,
            frameon=False,
            handlelength=3.2,
            borderaxespad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return drawn


def _style(i: int, label: str) -> dict[str, Any]:
    return {
        "label": _wrapped(label),
        "color": COLORS[i % len(COLORS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
        "linewidth": 1.1,
    }


def _wrapped(label: str) -> str:
    """A label on as many lines as it needs. Those that begin with an underscore would not be shown."""
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
    axes.set_ylabel(panel.label, fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(values: Any) -> Any:
    """Of the finite values in a window around each, which is cut at the ends."""
    half = max(5, len(values) // 20) // 2
    means = np.full(len(values), np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        means[i] = np.nanmean(values[max(i - half, 0) : i + half + 1])
    return means


def _marked(values: Any, phase: float, markers: int = 6) -> list[bool]:
    """Which points get a marker: some, at other places than those of other lines, and all that have no neighbour."""
    there = np.isfinite(values)
    padded = np.concatenate(([False], there, [False]))
    marked = there & ~padded[:-2] & ~padded[2:]
    points = np.flatnonzero(there)
    marked[points[((np.arange(markers) + phase) / markers * len(points)).astype(int)]] = True
    return [bool(mark) for mark in marked]


# ---------------------------------------------------------------------- writing


def check_file(path: Path) -> None:
    """Raise where ``save`` could not write."""
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"cannot write {path}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise PlotError(f"cannot write {path}: the folder {path.parent} does not exist")


def save(drawn: "Figure", path: Path | str) -> None:
    """Write a figure as PNG (300 dpi), SVG or PDF. The text of the latter two stays text."""
    import matplotlib

    check_file(Path(path))
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        drawn.savefig(path, dpi=300)
