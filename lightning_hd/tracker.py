"""What there is to log of one optimizer: its trajectory, and means over the steps since they were last logged."""

import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torchmetrics import MeanMetric

from lightning_hd.hypergradient import HypergradientLR
from lightning_hd.lr import get_lrs
from lightning_hd.tensorboard import group_names, tag

_WINDOW = 100
"""Over how many steps the running mean of the cosine is taken."""


class Tracker:
    """Records every step of an engine.

    Args:
        engine: The engine.
        name: What its optimizer is called in tags.
    """

    def __init__(self, engine: HypergradientLR, name: str) -> None:
        self.engine = engine
        self.name = name
        self._names: list[str] = []
        self._configured = get_lrs(engine.optimizer.param_groups)
        self._history: list[array[float]] = []
        self._seen: dict[tuple[str, int], list[float]] = {}  # of each scope, since it was last logged
        self._cosines: dict[int, deque[float]] = {}  # the last ones of each scope
        self._curve: list[tuple[int, int]] = []  # steps on the axis of loggers, and how many there were until then
        self._step_count = engine.step_count
        self._logged = 0  # how many steps are in the curves already
        self.has_news = False
        self._handles: list[RemovableHandle] = [
            engine.optimizer.register_step_pre_hook(self._begin),
            engine.optimizer.register_step_post_hook(self._record),
        ]

    def detach(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._step_count = self.engine.step_count

    def _record(self, *_: Any) -> None:
        """Called after every call of ``optimizer.step``, which need not have been a step of the engine."""
        if self.engine.step_count == self._step_count:
            return
        self.has_news = True
        lrs = self.engine.lrs
        self._history.extend(array("d") for _ in lrs[len(self._history) :])
        for history, lr in zip(self._history, lrs, strict=True):
            history.append(lr)
        for i, seen in enumerate(self.engine.last):
            if seen is None or not all(map(math.isfinite, seen)):
                continue
            for quantity, value in (("value", seen.hypergradient), ("cosine", seen.cosine)):
                self._seen.setdefault((quantity, i), []).append(value)
            self._cosines.setdefault(i, deque(maxlen=_WINDOW)).append(seen.cosine)

    def configured(self, group: int) -> float:
        """The rate that a group had before the first step."""
        return self._configured[group] if group < len(self._configured) else math.nan

    def mean_cosines(self) -> list[tuple[str, float]]:
        """The running mean of the cosine of each scope, where there is one."""
        names = self._scopes()
        return [(names[i], _mean(cosines)) for i, cosines in self._cosines.items()]

    def names(self) -> list[str]:
        """The name of each group: it stays, though groups are added since."""
        if len(self._names) < len(self.engine.optimizer.param_groups):
            self._names += group_names(self.name, self.engine.optimizer)[len(self._names) :]
        return self._names

    def go_on(self, names: Sequence[str]) -> None:
        """Call the groups as a former run of the same optimizer has called them."""
        own = all(name.partition("/")[0] == self.name for name in names)
        if own and len(names) <= len(self.engine.optimizer.param_groups):
            self._names = list(names)

    def mark(self, step: int) -> None:
        """A batch is over: steps that are new belong there on the axis of loggers."""
        count = len(self._history[0]) if self._history else 0
        if count > (self._curve[-1][1] if self._curve else self._logged):
            self._curve.append((step, count))

    def skip(self) -> None:
        """Nothing is logged: what waits for it is dropped."""
        self._seen.clear()

    def take_curve(self) -> list[tuple[str, float, int]]:
        """The name of each group, its rate, and the step on the axis of loggers, for all steps since the last call."""
        points = []
        for step, count in self._curve:
            for name, lrs in zip(self.names(), self._history, strict=False):
                back = len(self._history[0]) - count  # groups that were added later have shorter histories
                if len(lrs) > back:
                    points.append((name, lrs[-1 - back], step))
            self._logged = count
        self._curve = []
        return points

    def history(self) -> list[tuple[str, list[float]]]:
        """The name of each group, and the effective rate of every step."""
        return [(name, lrs.tolist()) for name, lrs in zip(self.names(), self._history, strict=False)]

    def lr_metrics(self) -> dict[str, float]:
        """The tags and the effective rates of all groups."""
        return {tag("lr", name): lr for name, lr in zip(self.names(), self.engine.lrs, strict=True)}

    def current(self) -> dict[str, float]:
        """All that is logged, as the last step has left it."""
        metrics = self.lr_metrics()
        for name, scale, n, seen in zip(
            self._scopes(), self.engine.scales, self.engine.brakes, self.engine.last, strict=False
        ):
            metrics |= {tag("scale", name): scale, tag("brakes", name): float(n)}
            if seen is not None:
                metrics |= {tag("value", name): seen.hypergradient, tag("cosine", name): seen.cosine}
        return metrics

    def _scopes(self) -> list[str]:
        return self.names() if self.engine.scope == "group" else [self.name]

    def collect(self) -> dict[str, float]:
        """All that is logged now beside the rates; the means start anew."""
        names = self._scopes()
        metrics = {tag("scale", name): scale for name, scale in zip(names, self.engine.scales, strict=False)}
        if self.engine.under_schedule:
            for i, (name, lr) in enumerate(zip(self.names(), self.engine.lrs, strict=True)):
                scale = self.engine.scales[i if self.engine.scope == "group" else 0]
                metrics |= {tag("schedule", name): lr / scale} if scale else {}
        metrics |= {tag("brakes", name): float(n) for name, n in zip(names, self.engine.brakes, strict=False) if n}
        for (quantity, i), values in self._seen.items():
            metrics[tag(quantity, names[i])] = _mean(values)
            if quantity == "cosine":
                metrics[tag("mean_cosine", names[i])] = _mean(self._cosines[i])
        self._seen.clear()
        self.has_news = False
        return metrics


def _mean(values: Iterable[float]) -> float:
    return float(MeanMetric().set_dtype(torch.float64)(torch.tensor([*values], dtype=torch.float64)))
