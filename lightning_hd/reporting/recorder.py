"""Records what is logged of one optimizer: every step, and means over the steps since they were last logged."""

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torchmetrics import MeanMetric

from lightning_hd.engine.lr import get_lrs
from lightning_hd.engine.tuner import HypergradientLR
from lightning_hd.reporting.names import group_names, tag
from lightning_hd.reporting.runs import Curve, Curves

_WINDOW = 100
"""The number of steps in the running mean of the cosine."""


class Tracker:
    """Records every step of an engine.

    Args:
        engine: The engine.
        name: The name of its optimizer in tags.
    """

    def __init__(self, engine: HypergradientLR, name: str) -> None:
        self.engine = engine
        self.name = name
        self._names: list[str] = []
        self._configured = get_lrs(engine.optimizer.param_groups)
        self._lrs: list[array[float]] = []  # of each group; those of groups that were added later are shorter
        self._leaders: list[int] = []  # for each group, the first group that has had the same rate in every step
        self._written: list[int] = []  # for each group, how many points are in event files
        self._scales: list[array[float]] = []  # of each scope
        self._cosines: list[array[float]] = []  # of each scope
        self._losses = array("d")
        self._axis = array("q")  # the place of each step on the axis of loggers
        self._seen: dict[tuple[str, int], list[float]] = {}  # of each scope, since they were last logged
        self._step_count = engine.step_count
        self.untuned = 0  # steps of the optimizer that the engine did not tune
        self.has_news = False
        self._handles: list[RemovableHandle] = [
            engine.optimizer.register_step_pre_hook(self._begin),
            engine.optimizer.register_step_post_hook(self._record),
        ]

    def detach(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._step_count = self.engine.step_count

    def _record(self, *_: Any) -> None:
        """Record a step, after any call of ``optimizer.step``. The engine may not have tuned it."""
        engine = self.engine
        if engine.step_count == self._step_count:
            self.untuned += not engine.paused
            return
        self.has_news = True
        seen = [found if found and all(map(math.isfinite, found)) else None for found in engine.last]
        _append(self._lrs, engine.lrs)
        _append(self._scales, engine.scales)
        _append(self._cosines, [found.cosine if found else math.nan for found in seen])
        self._losses.append(math.nan if engine.loss is None else engine.loss)
        self._compare()
        for i, found in enumerate(seen):
            if found:
                self._seen.setdefault(("hypergradient", i), []).append(found.hypergradient)
                self._seen.setdefault(("cosine", i), []).append(found.cosine)

    def _compare(self) -> None:
        """Find groups that had the same rate in all steps so far, and no longer have it."""
        self._leaders.extend(0 for _ in self._lrs[len(self._leaders) :])
        self._written.extend(0 for _ in self._lrs[len(self._written) :])
        for i, (leader, lrs) in enumerate(zip(self._leaders, self._lrs, strict=True)):
            if leader != i and (lrs[-1] != self._lrs[leader][-1] or len(lrs) != len(self._lrs[leader])):
                self._leaders[i] = next(k for k in range(i + 1) if self._lrs[k] == lrs)

    def scope_of(self, group: int) -> int:
        """The scope of a group."""
        return group if self.engine.scope == "group" else 0

    def configured(self, group: int) -> float:
        """The rate that a group had before the first step."""
        return self._configured[group] if group < len(self._configured) else math.nan

    def scopes(self) -> list[tuple[str, list[float], list[float], list[float]]]:
        """For each scope its name, its scales, its known cosines, and its scheduled rates."""
        found = []
        for i, (name, scales, cosines) in enumerate(zip(self._scopes(), self._scales, self._cosines, strict=False)):
            lrs = self._lrs[i][-len(scales) :]  # with scope="global", those of the first group
            schedule = [lr / scale if scale else math.nan for lr, scale in zip(lrs, scales, strict=True)]
            known = [cosine for cosine in cosines if cosine and not math.isnan(cosine)]  # 0: there was no gradient
            found.append((name, scales.tolist(), known, schedule if self.engine.under_schedule else []))
        return found

    def _mean_cosine(self, scope: int) -> float:
        return _mean(cosine for cosine in self._cosines[scope][-_WINDOW:] if not math.isnan(cosine))

    def names(self) -> list[str]:
        """The name of each group. A name stays when groups are added."""
        if len(self._names) < len(self.engine.optimizer.param_groups):
            self._names += group_names(self.name, self.engine.optimizer)[len(self._names) :]
        return self._names

    def go_on(self, names: Sequence[str]) -> None:
        """Use the names that a former run of the same optimizer has given to the groups."""
        own = all(name.partition("/")[0] == self.name for name in names)
        if own and len(names) <= len(self.engine.optimizer.param_groups):
            self._names = list(names)
            self._leaders = list(range(len(self._names)))  # each goes on with the card that it had

    @property
    def has_points(self) -> bool:
        """Whether there is something to draw."""
        return len(self._axis) > 0

    def mark(self, step: int) -> None:
        """Place new steps at ``step`` on the axis of loggers, after a batch."""
        self._axis.extend([step] * (len(self._losses) - len(self._axis)))

    def skip(self) -> None:
        """Drop the numbers that wait to be logged."""
        self._seen.clear()
        self._written = [len(self._axis)] * len(self._written)

    def take_curve(self) -> list[tuple[str, float, int]]:
        """The name of a group, its rate, and the step on the axis of loggers, for all steps since the last call.

        Groups that have had the same rate in every step share the curve of the first.
        """
        points = []
        for i, (name, leader, lrs) in enumerate(zip(self.names(), self._leaders, self._lrs, strict=False)):
            if i == leader:
                steps, values = self._points(lrs, self._written[i])
                points += [(name, lr, step) for step, lr in zip(steps, values, strict=True)]
                self._written[i] = len(self._axis)
        return points

    def _points(self, numbers: Sequence[float], start: int = 0) -> tuple[list[int], list[float]]:
        """Steps on the axis of loggers, from place ``start`` on, and the last number in each, if there is one."""
        late = len(self._losses) - len(numbers)
        axis = self._axis
        places = range(max(start, late), len(axis))
        last = [i for i in places if i + 1 == len(axis) or axis[i + 1] != axis[i]]
        known = [i for i in last if not math.isnan(numbers[i - late])]
        return [axis[i] for i in known], [numbers[i - late] for i in known]

    def curves(self) -> Curves:
        """The curves to draw."""

        def named(names: Sequence[str], histories: Sequence[Sequence[float]]) -> dict[str, Curve]:
            short = [name.removeprefix(f"{self.name}/") for name in names]
            return {name: self._points(history) for name, history in zip(short, histories, strict=False)}

        cosines = named(self._scopes(), self._cosines)
        return Curves(self.name, named(self.names(), self._lrs), self._points(self._losses), cosines)

    def history(self) -> list[tuple[str, list[float]]]:
        """The name of each group, and the effective rate of every step."""
        return [(name, lrs.tolist()) for name, lrs in zip(self.names(), self._lrs, strict=False)]

    def lr_metrics(self) -> dict[str, float]:
        """The tags and the effective rates of all groups."""
        return {tag("lr", name): lr for name, lr in zip(self.names(), self.engine.lrs, strict=True)}

    def current(self) -> dict[str, float]:
        """The current values of all that is logged."""
        metrics = self.lr_metrics()
        for name, scale, n, seen in zip(
            self._scopes(), self.engine.scales, self.engine.backoffs, self.engine.last, strict=False
        ):
            metrics |= {tag("scale", name): scale, tag("backoffs", name): float(n)}
            if seen is not None:
                metrics |= {tag("hypergradient", name): seen.hypergradient, tag("cosine", name): seen.cosine}
        return metrics

    def _scopes(self) -> list[str]:
        return self.names() if self.engine.scope == "group" else [self.name]

    def collect(self) -> dict[str, float]:
        """All numbers to log now, except for the rates. The means start anew."""
        names = self._scopes()
        metrics = {tag("scale", name): scale for name, scale in zip(names, self.engine.scales, strict=False)}
        if self.engine.under_schedule:
            for i, (name, lr) in enumerate(zip(self.names(), self.engine.lrs, strict=True)):
                scale = self.engine.scales[self.scope_of(i)]
                metrics |= {tag("schedule", name): lr / scale} if scale else {}
        metrics |= {tag("backoffs", name): float(n) for name, n in zip(names, self.engine.backoffs, strict=False) if n}
        for (quantity, i), values in self._seen.items():
            metrics[tag(quantity, names[i])] = _mean(values)
            if quantity == "cosine":
                metrics[tag("mean_cosine", names[i])] = self._mean_cosine(i)
        self._seen.clear()
        self.has_news = False
        return metrics


def _append(histories: "list[array[float]]", numbers: Sequence[float]) -> None:
    """Append a number to each history. Histories of groups that were added begin here."""
    histories.extend(array("d") for _ in numbers[len(histories) :])
    for history, number in zip(histories, numbers, strict=True):
        history.append(number)


def _mean(values: Iterable[float]) -> float:
    return float(MeanMetric().set_dtype(torch.float64)(torch.tensor([*values], dtype=torch.float64)))
