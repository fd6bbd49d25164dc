"""How much the time to a training loss depends on α₀ and β: a figure, and its numbers as a table."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from paper.figures import PLAIN, STYLES, new_figure
from paper.settings import BASES, Base, Rule, Run
from paper.table import markdown
from paper.training import Measured

Line: TypeAlias = tuple[Rule, float]
"""A rule and its β."""

BETA_STYLES = (("#a6cee3", "v"), ("#5aa5d0", "D"), ("#0072B2", "s"), ("#08306b", "P"))
"""Darker for larger β."""


def reached(measured: Mapping[Run, Measured], base: Base) -> dict[Line, dict[float, int | None]]:
    """The iterations to the threshold by α₀, for each rule and β; ``None`` where it was not reached."""
    lines: dict[Line, dict[float, int | None]] = {}
    for run, each in measured.items():
        if run.base == base:
            done = len(each.losses) if run.threshold is not None and each.has_reached(run.threshold) else None
            lines.setdefault((run.rule, run.beta), {})[run.alpha_0] = done
    return lines


def label(line: Line) -> str:
    """What the figure and the table call it."""
    rule, beta = line
    return f"-HD, β = {beta:g}" if rule == "additive" else str(STYLES[rule]["label"])


def make_table(measured: Mapping[Run, Measured]) -> str:
    """A row for each rule and β, a column for each α₀."""
    run = next(iter(measured))
    alphas = sorted({run.alpha_0 for run in measured})
    rows = [
        [f"{base}, {label(line)}", *(_cell(by_alpha, alpha) for alpha in alphas)]
        for base in BASES
        for line, by_alpha in reached(measured, base).items()
    ]
    title = f"Iterations to a training loss of {run.threshold:g}; – where it was not reached in {run.length:,}."
    return f"{title}\n\n{markdown(['α₀', *(f'{alpha:g}' for alpha in alphas)], rows)}"


def _cell(by_alpha: Mapping[float, int | None], alpha: float) -> str:
    return f"{by_alpha[alpha] or '–'}" if alpha in by_alpha else ""


def draw(measured: Mapping[Run, Measured]) -> Figure:
    """A panel for each optimizer: the flatter a line, the less there is to tune."""
    run = next(iter(measured))
    with mpl.rc_context(PLAIN):
        figure = new_figure(7.5, 3.4)
        panels = figure.subplots(1, len(BASES), sharey=True)
        for panel, base in zip(panels, BASES, strict=True):
            panel.set(title=base, xlabel="initial learning rate α₀", xscale="log", yscale="log")
            _draw_lines(panel, reached(measured, base), 2 * run.length)
        panels[0].set_ylabel(f"iterations to a training loss of {run.threshold:g}")
    return figure


def _draw_lines(panel: Axes, lines: Mapping[Line, Mapping[float, int | None]], top: float) -> None:
    styles = iter(BETA_STYLES)
    for line, by_alpha in lines.items():
        style: dict[str, Any] = dict(STYLES[line[0]])
        if line[0] == "additive":
            style["color"], style["marker"] = next(styles)
        style["label"] = label(line)
        if line[0] == "auto":
            del style["marker"]
            panel.axhline(next(iter(by_alpha.values())) or top, **style, linewidth=2)
        else:
            panel.plot(list(by_alpha), [each or top for each in by_alpha.values()], **style)
    panel.axhspan(top / 1.3, top * 2, color="#eeeeee", zorder=0)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=7)
    panel.text(0.02, 1.45 * top, "not reached", transform=panel.get_yaxis_transform(), va="center", fontsize=7)
