"""What there is to log of one optimizer: its trajectory, and means over the steps since they were last logged."""

import math
from array import array
from typing import Any

from torch.utils.hooks import RemovableHandle

from lightning_hd.hypergradient import HypergradientLR
from lightning_hd.tensorboard import group_names, tag


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
        self._history: list[array[float]] = []
        self._sums: dict[tuple[str, int], tuple[float, int]] = {}  # with how many numbers were added
        self._step_count = engine.step_count
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
                total, count = self._sums.get((quantity, i), (0.0, 0))
                self._sums[quantity, i] = total + value, count + 1

    def names(self) -> list[str]:
        """The name of each group: it stays, though groups are added since."""
        now = group_names(self.name, self.engine.optimizer)
        self._names += now[len(self._names) :]
        return self._names

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
        """All that is logged now; the means start anew."""
        metrics, names = self.lr_metrics(), self._scopes()
        metrics |= {tag("scale", name): scale for name, scale in zip(names, self.engine.scales, strict=False)}
        metrics |= {tag("brakes", name): float(n) for name, n in zip(names, self.engine.brakes, strict=False) if n}
        for (quantity, i), (total, count) in self._sums.items():
            metrics[tag(quantity, names[i])] = total / count
        self._sums.clear()
        self.has_news = False
        return metrics
