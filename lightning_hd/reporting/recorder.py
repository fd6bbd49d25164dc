"""Records every step of one optimizer."""

import math
from array import array
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.engine import HypergradientLR
from lightning_hd.optimizers import get_lr, group_names
from lightning_hd.reporting.names import tag
from lightning_hd.reporting.runs import Curve, Curves

_WINDOW = 100
"""The number of steps in the running mean of the cosine."""


class Course(NamedTuple):
    """What the steps have shown of one scope."""

    name: str
    scales: list[float]
    cosines: list[float]  # where they are known, and there was a gradient
    schedule: list[float]  # the scheduled rates of its first group; empty without a schedule


class Recorder:
    """Records every step of an engine.

    Args:
        engine: The engine.
        optimizer: Its optimizer.
        name: The name of the optimizer in tags.
        scope: The scope of the learned rates: ``"global"`` or ``"group"``.
        configured: The rates that the parameter groups are configured with.
    """

    def __init__(
        self, engine: "HypergradientLR", optimizer: Optimizer, name: str, scope: str, configured: Sequence[float]
    ) -> None:
        self.engine = engine
        self.name = name
        self.untuned = 0  # steps of the optimizer that the engine did not tune
        self._optimizer = optimizer
        self._by_group = scope == "group"
        self._configured = list(configured)
        self._names: list[str] = []
        # one number for each step, which is NaN where nothing is known, as before a group was added
        self._lrs: list[array[float]] = []  # of each group
        self._scales: list[array[float]] = []  # of each scope, like the next two
        self._cosines: list[array[float]] = []
        self._hypergradients: list[array[float]] = []
        self._losses = array("d")
        self._backoffs: Sequence[int] = ()  # of each scope, up to the last step
        self._axis = array("q")  # the place of each step on the axis of loggers
        self._logged = 0  # how many steps are in the means that were logged
        self._drawn = 0  # how many steps are in event files
        self._shown: Any = None  # the numbers that others were given
        self._step_count = engine.step_count
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._record),
        ]

    def detach(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def see_groups(self) -> None:
        """Note the rates that new groups are configured with, before their first step."""
        self._configured += map(get_lr, self._optimizer.param_groups[len(self._configured) :])

    def _begin(self, *_: Any) -> None:
        self._step_count = self.engine.step_count

    def _record(self, *_: Any) -> None:
        """Record a step, after any call of ``optimizer.step``. The engine may not have tuned it."""
        engine = self.engine
        if engine.step_count == self._step_count:
            self.untuned += not engine.paused
            return
        seen = [found if found and all(map(math.isfinite, found)) else None for found in engine.last]
        self._append(self._lrs, engine.lrs)
        self._append(self._scales, engine.scales)
        self._append(self._cosines, [found.cosine if found else math.nan for found in seen])
        self._append(self._hypergradients, [found.hypergradient if found else math.nan for found in seen])
        stats = engine.stats
        self._losses.append(math.nan if stats.loss is None else stats.loss)
        self._backoffs = stats.backoffs

    def _append(self, histories: "list[array[float]]", numbers: Sequence[float]) -> None:
        """Append a number to each history, the first ones of this step. New histories begin with NaN."""
        histories.extend(array("d", [math.nan] * self.steps) for _ in numbers[len(histories) :])
        for history, number in zip(histories, numbers, strict=True):
            history.append(number)

    # ------------------------------------------------------------------ names

    def names(self) -> list[str]:
        """The name of each group. A name stays when groups are added."""
        if len(self._names) < len(self._optimizer.param_groups):
            self._names += group_names(self.name, self._optimizer)[len(self._names) :]
        return self._names

    def go_on(self, names: Sequence[str]) -> None:
        """Use the names that a former run of the same optimizer has given to the groups."""
        own = all(name.partition("/")[0] == self.name for name in names)
        if own and len(names) <= len(self._optimizer.param_groups):
            self._names = list(names)

    def _scopes(self) -> list[str]:
        return self.names() if self._by_group else [self.name]

    def scope_of(self, group: int) -> int:
        """The scope of a group."""
        return group if self._by_group else 0

    # ------------------------------------------------------------------ logs

    @property
    def steps(self) -> int:
        """The number of recorded steps."""
        return len(self._losses)

    @property
    def has_news(self) -> bool:
        """Whether there are steps that no mean was logged of."""
        return self._logged < self.steps

    def mark(self, step: int) -> None:
        """Place new steps at ``step`` on the axis of loggers, after a batch."""
        self._axis.extend([step] * (self.steps - len(self._axis)))

    def skip(self) -> None:
        """Drop the numbers that wait to be logged."""
        self._logged, self._drawn = self.steps, len(self._axis)

    def lr_metrics(self) -> dict[str, float]:
        """The tags and the effective rates of all groups."""
        return {tag("lr", name): lr for name, lr in zip(self.names(), self.engine.lrs, strict=True)}

    def news(self) -> dict[str, float]:
        """The numbers of the last step; none if they are as they were at the last call."""
        engine = self.engine
        numbers = engine.lrs, engine.scales, engine.last, self._backoffs
        if numbers == self._shown:
            return {}
        self._shown = numbers
        return self.lr_metrics() | self._metrics(self.steps - 1)

    def collect(self) -> dict[str, float]:
        """All numbers to log now, except for the rates. The means start anew."""
        engine, since, self._logged = self.engine, self._logged, self.steps
        none = tag("backoffs-")  # they are logged once there are any
        metrics = {key: value for key, value in self._metrics(since).items() if value or not key.startswith(none)}
        for name, cosines in zip(self._scopes(), self._cosines, strict=False):
            if tag("cosine", name) in metrics:
                metrics[tag("mean_cosine", name)] = fmean(_known(cosines[-_WINDOW:]))
        for i, (name, lr) in enumerate(zip(self.names(), engine.lrs, strict=True) if engine.scheduled else ()):
            if scale := engine.scales[self.scope_of(i)]:
                metrics[tag("schedule", name)] = lr / scale
        return metrics

    def _metrics(self, since: int) -> dict[str, float]:
        """Scales, counts of back-offs, and means over the steps from ``since`` on."""
        names, engine = self._scopes(), self.engine
        metrics = {tag("scale", name): scale for name, scale in zip(names, engine.scales, strict=False)}
        metrics |= {tag("backoffs", name): float(n) for name, n in zip(names, self._backoffs, strict=False)}
        for quantity, histories in (("hypergradient", self._hypergradients), ("cosine", self._cosines)):
            for name, history in zip(names, histories, strict=False):
                if new := _known(history[since:]):
                    metrics[tag(quantity, name)] = fmean(new)
        return metrics

    def take_curve(self) -> list[tuple[str, float, int]]:
        """The name of a group, its rate, and the step on the axis of loggers, for all steps since the last call."""
        points = [
            (name, lr, step)
            for name, lrs in zip(self.names(), self._lrs, strict=False)
            for step, lr in zip(*self._points(lrs, self._drawn), strict=True)
        ]
        self._drawn = len(self._axis)
        return points

    # ------------------------------------------------------------------ the whole training

    def history(self) -> list[tuple[str, list[float]]]:
        """The name of each group, and the effective rate of every step."""
        return [(name, _known(lrs)) for name, lrs in zip(self.names(), self._lrs, strict=False)]

    def configured(self, group: int) -> float:
        """The rate that a group was configured with; NaN if it was added between two steps of one batch."""
        return self._configured[group] if group < len(self._configured) else math.nan

    def courses(self) -> list[Course]:
        """The course of each scope."""
        found = []
        columns = zip(self._scopes(), self._lrs, self._scales, self._cosines, strict=False)
        for name, lrs, scales, cosines in columns:
            schedule = [lr / scale if scale else math.nan for lr, scale in zip(lrs, scales, strict=True)]
            known = [cosine for cosine in _known(cosines) if cosine]  # 0: there was no gradient
            found.append(Course(name, scales.tolist(), known, schedule if self.engine.scheduled else []))
        return found

    def curves(self) -> Curves:
        """The curves to draw."""

        def named(names: Sequence[str], histories: Sequence[Sequence[float]]) -> dict[str, Curve]:
            short = [name.removeprefix(f"{self.name}/") for name in names]
            return {name: self._points(history) for name, history in zip(short, histories, strict=False)}

        cosines = named(self._scopes(), self._cosines)
        return Curves(self.name, named(self.names(), self._lrs), self._points(self._losses), cosines)

    def _points(self, numbers: Sequence[float], start: int = 0) -> tuple[list[int], list[float]]:
        """Steps on the axis of loggers, from place ``start`` on, and the last number in each, if there is one."""
        axis = self._axis
        last = [i for i in range(start, len(axis)) if i + 1 == len(axis) or axis[i + 1] != axis[i]]
        known = [i for i in last if not math.isnan(numbers[i])]
        return [axis[i] for i in known], [numbers[i] for i in known]


def _known(numbers: Iterable[float]) -> list[float]:
    return [number for number in numbers if not math.isnan(number)]
